"""Rows of JSON files, one after another: an object a line, or the items of one array.

Of a file no more is in memory than the row being read and what was read ahead of it. An array is decoded item by item:
Python's decoder is given more text until it finds an item's end, twice as much each time, so a long item costs no more
than twice its length. Bytes that are no UTF-8 are carried through as what `surrogateescape` makes of them, so that one
such row does not hide the others.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, BinaryIO

from tuner.data.records import MAX_ROW_BYTES, Row, row_of, too_long
from tuner.errors import DataError

CHUNK = 1 << 18
BLANK = " \t\r\n"
NO_LINES = "are there line ends in this file?"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def json_rows(file: Path) -> Iterator[Row]:
    """Rows of a file whose content decides, not its name, whether it holds lines or an array; blank lines are none.

    Raises:
        DataError: in an array, what is no JSON, behind which no next item can be found.
    """
    with file.open("rb") as stream:
        start = skip_byte_order_mark(stream, file)
        is_array = _first_visible(stream) == b"["
        stream.seek(start)
        yield from _Array(stream, file).rows() if is_array else _lines(stream, file)


def skip_byte_order_mark(stream: BinaryIO, file: Path) -> int:
    """Move behind a UTF-8 mark at the start, if there is one; the place where the text begins.

    Raises:
        DataError: the mark is another encoding's.
    """
    head = stream.read(len(codecs.BOM_UTF8))
    if head.startswith(UTF16):
        raise DataError(f"{file}:1: UTF-16 text; save the file as UTF-8")
    start = len(head) if head == codecs.BOM_UTF8 else 0
    stream.seek(start)
    return start


def _first_visible(stream: BinaryIO) -> bytes:
    while chunk := stream.read(CHUNK):
        if visible := chunk.lstrip():
            return visible[:1]
    return b""


def _lines(stream: BinaryIO, file: Path) -> Iterator[Row]:
    # At \n alone: str.splitlines would also cut at characters that may stand within a JSON text
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        origin = f"{file}:{number}"
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            yield too_long(origin, NO_LINES)
            while (line := stream.readline(CHUNK)) and not line.endswith(b"\n"):
                pass
        elif line.strip():
            yield _row_of_line(line, origin)


def _row_of_line(line: bytes, origin: str) -> Row:
    text = line.decode("utf-8", "surrogateescape")
    try:
        return _checked(text, json.loads(text), origin)
    except JSONDecodeError as error:
        return DataError(f"{origin}: {_reason(error, error.colno)}")
    except RecursionError:
        return DataError(f"{origin}: nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return DataError(f"{origin}: not valid JSON: {error}")


def _checked(text: str, value: Any, origin: str) -> Row:
    """The row that `value`, decoded from `text`, is, if all of it is text that UTF-8 can write."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return DataError(f"{origin}: not UTF-8 text (byte 0x{ord(text[error.start]) & 0xFF:02x})")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return DataError(f"{origin}: holds half of a surrogate pair, which is no text")
    return row_of(value, origin)


def _reason(error: JSONDecodeError, column: int) -> str:
    found = error.doc[error.pos : error.pos + 1]
    if found and 0xDC80 <= ord(found) <= 0xDCFF:
        return f"not UTF-8 text (byte 0x{ord(found) & 0xFF:02x})"
    what = "a NUL byte" if found == "\0" else error.msg
    return f"not valid JSON: {what} at column {column}"


class _Array:
    """The items of one array. `text[at:]` is what was read and not yet used; before it lie `lines` line ends, and
    `columns` characters of the line in which `text` begins."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self.stream, self.file = stream, file
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.ended = "", 0, False
        self.lines = self.columns = 0

    def rows(self) -> Iterator[Row]:
        self._take("[")
        if self._mark() == "]":
            self.at += 1
            return self._end()
        for number in range(1, 1 << 62):
            self._mark()
            origin = f"{self.file}: item {number}"
            value, end = self._item(origin)
            text, self.at = self.text[self.at : end], end
            yield _checked(text, value, origin)
            if self._take(",]") == "]":
                return self._end()

    def _more(self) -> bool:
        """Read as much again as is unused; whether there was more."""
        used, rest = self.text[: self.at], self.text[self.at :]
        self.lines += used.count("\n")
        self.columns = len(used) - used.rfind("\n") - 1 + (0 if "\n" in used else self.columns)
        chunk = self.stream.read(max(CHUNK, len(rest)))
        self.text, self.at, self.ended = rest + self.decoder.decode(chunk, not chunk), 0, not chunk
        return bool(chunk)

    def _mark(self) -> str:
        """The next character that is not blank, where `at` is then; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in BLANK:
                self.at += 1
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def _take(self, marks: str) -> str:
        mark = self._mark()
        if not mark or mark not in marks:
            expected = " or ".join(f"'{mark}'" for mark in marks)
            raise self._error(JSONDecodeError(f"Expecting {expected}", self.text, self.at))
        self.at += 1
        return mark

    def _end(self) -> None:
        if self._mark():
            raise self._error(JSONDecodeError("Extra data behind the array", self.text, self.at))

    def _item(self, origin: str) -> tuple[Any, int]:
        """The value that begins at `at`, and where it ends in `text`."""
        before: tuple[str, int] | None = None
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # else digits of a number may follow
                    return value, end
            except JSONDecodeError as error:
                # An error that more text does not move is no missing end; a string's end may be far away
                found = (error.msg, error.pos - self.at)
                if self.ended or (found == before and not error.msg.startswith("Unterminated")):
                    raise self._error(error) from error
                before = found
            except RecursionError as error:
                raise DataError(f"{self._place(self.at)}: nested too deeply") from error
            except ValueError as error:
                raise DataError(f"{origin}: not valid JSON: {error}") from error
            if len(self.text) - self.at > MAX_ROW_BYTES:
                raise too_long(origin, "leave it out")
            self._more()

    def _place(self, position: int) -> str:
        return f"{self.file}:{self.lines + self.text.count(chr(10), 0, position) + 1}"

    def _error(self, error: JSONDecodeError) -> DataError:
        columns = 0 if "\n" in self.text[: error.pos] else self.columns
        return DataError(f"{self._place(error.pos)}: {_reason(error, columns + error.colno)}")
