"""Rows of Parquet files, through pyarrow's record batches: a batch of rows in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.data.records import MAX_ROW_BYTES, Record, Row, require_different, too_long
from tuner.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 512
READ_AHEAD = 1 << 20
"""Bytes of a Parquet column that are read at once; without it, and with `pre_buffer`, whole row groups."""


def parquet_rows(file: Path) -> Iterator[Row]:
    """Rows of a Parquet file.

    Raises:
        DataError: it is none, or damaged.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file, buffer_size=READ_AHEAD, pre_buffer=False) as table:
            require_different(file, table.schema_arrow.names)
            for batch in table.iter_batches(BATCH_ROWS, use_threads=False):
                yield from _rows(batch, file, number)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        place = f"{file}: behind row {number}" if number else f"{file}"
        raise DataError(f"{place}: cannot be read as Parquet: {' '.join(str(error).split())}") from error


def _rows(batch: pa.RecordBatch, file: Path, before: int) -> Iterator[Row]:
    if batch.nbytes > MAX_ROW_BYTES and batch.num_rows > 1:
        for i in range(batch.num_rows):
            yield from _rows(batch.slice(i, 1), file, before + i)
    elif batch.nbytes > MAX_ROW_BYTES:
        yield too_long(f"{file}: row {before + 1}", "leave such rows out")
    else:
        yield from _converted(batch, file, before)


def _converted(batch: pa.RecordBatch, file: Path, before: int) -> Iterator[Row]:
    try:
        for number, fields in enumerate(batch.to_pylist(), start=before + 1):
            yield Record(fields, f"{file}: row {number}")
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            byte = error.object[error.start]
            yield DataError(f"{file}: row {before + 1}: not UTF-8 text (byte 0x{byte:02x})")
            return
        for i in range(batch.num_rows):
            yield from _converted(batch.slice(i, 1), file, before + i)
