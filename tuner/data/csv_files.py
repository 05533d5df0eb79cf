"""Rows of CSV files whose first line names the columns; every cell is a text, whatever it looks like.

Python's own reader and not pyarrow's, which reads 32 blocks ahead, each as long as the longest row there may be: half a
gigabyte. It would know rows by number and not by line, too. Python's is slower, and no slower than JSON.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tuner.data.json_files import skip_byte_order_mark
from tuner.data.records import MAX_ROW_BYTES, Record, Row, require_different, too_long
from tuner.errors import DataError


def csv_rows(file: Path) -> Iterator[Row]:
    """Rows, each known by the line it begins in; blank lines are none.

    Raises:
        DataError: the columns have no names that differ, or a row does not end, as behind a quote that nothing closes.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    with file.open("rb") as stream:
        skip_byte_order_mark(stream, file)
        lines = _Lines(stream, file)
        names: list[str] | None = None
        for cells in _cells(lines):
            if names is not None:
                yield cells if isinstance(cells, DataError) else _row(names, cells, lines.origin)
            elif isinstance(cells, DataError):
                raise cells
            else:
                names = cells
                require_different(file, names)


class _Lines:
    """Lines of a file as text, what is no UTF-8 as `surrogateescape` makes it; `origin` is where the row begins."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self.stream, self.file = stream, file
        self.number = self.size = 0
        self.origin = ""

    def begin_row(self) -> None:
        self.origin, self.size = f"{self.file}:{self.number + 1}", 0

    def __iter__(self) -> Iterator[str]:
        while line := self.stream.readline(MAX_ROW_BYTES + 2):
            self.number += 1
            self.size += len(line)
            if self.size > MAX_ROW_BYTES:
                raise too_long(self.origin, "is there a quote that nothing closes?")
            yield line.decode("utf-8", "surrogateescape")


def _cells(lines: _Lines) -> Iterator[list[str] | DataError]:
    reader = csv.reader(lines, strict=True)
    while True:
        lines.begin_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield DataError(f"{lines.origin}: not valid CSV: {error}")
            continue
        if cells:
            yield _wrong_text(cells, lines.origin) or cells


def _wrong_text(cells: list[str], origin: str) -> DataError | None:
    text = "".join(cells)
    if "\0" in text:
        return DataError(f"{origin}: holds a NUL byte")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return DataError(f"{origin}: not UTF-8 text (byte 0x{ord(text[error.start]) & 0xFF:02x})")
    return None


def _row(names: list[str], cells: list[str], origin: str) -> Row:
    if len(cells) != len(names):
        number = "1 column" if len(cells) == 1 else f"{len(cells)} columns"
        return DataError(f"{origin}: {number} where the first line names {len(names)}")
    return Record(dict(zip(names, cells, strict=True)), origin)
