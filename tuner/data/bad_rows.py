"""Rows that cannot be learnt from: each is named, and none is left out unless a person says how many may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from tuner.data.dataset import Example, say_left_out
from tuner.data.records import Record, Row
from tuner.errors import DataError

LISTED = 20
"""Bad rows that an error lists."""

LOOK = 10_000
"""Rows that are read beyond the one that is refused, to say how many bad ones there are."""


class RowSource(Protocol):
    """Rows that can be read again and again."""

    def __iter__(self) -> Iterator[Row]: ...

    def content_digest(self) -> str:
        """Of all that decides what the rows are: equal digests are equal rows.

        Raises:
            DataError: there is nothing to read.
        """


class CheckedExamples:
    """Examples of rows; see `tuner.data.dataset.Examples`.

    Args:
        name: what the data is called in logs.
        rows: what they are in; each pass reads it from the beginning.
        example_of: the example that a row is; raises a DataError for a bad one.
        max_bad_rows: so many are left out, each named once on stderr.
    """

    def __init__(self, name: str, rows: RowSource, example_of: Callable[[Record], Example], max_bad_rows: int) -> None:
        self.name = name
        self.bad_rows: list[str] = []
        self.content_digest = rows.content_digest
        self._rows, self._example_of, self._max_bad_rows = rows, example_of, max_bad_rows

    def __iter__(self) -> Iterator[Example]:
        found = enumerate(map(self._judged, self._rows), start=1)
        listed: list[DataError] = []
        bad = 0
        for number, example in found:
            if isinstance(example, Example):
                yield example
                continue
            bad += 1
            listed = [*listed, example][:LISTED]
            if bad > self._max_bad_rows:
                raise self._refusal(listed, bad, number, found) from example
            if bad > len(self.bad_rows):  # each once, however often the rows are passed over
                self.bad_rows.append(f"bad row {bad} of data.max_bad_rows={self._max_bad_rows}: {example}")
                say_left_out(self.bad_rows[-1])

    def _judged(self, row: Row) -> Example | DataError:
        if isinstance(row, DataError):
            return row
        try:
            return self._example_of(row)
        except DataError as error:
            return error

    def _refusal(
        self, listed: list[DataError], bad: int, read: int, rest: Iterator[tuple[int, Example | DataError]]
    ) -> DataError:
        """The error for too many bad rows, `bad` of `read`, which counts those among the next rows of `rest` too."""
        end = read + LOOK
        try:
            for read, example in rest:
                if isinstance(example, DataError):
                    bad += 1
                    listed = [*listed, example][:LISTED]
                if read == end:
                    break
        except DataError as error:  # the file cannot be read any further, which is worth a line too
            bad, listed = bad + 1, [*listed, error][:LISTED]
        if bad == 1:
            return listed[0]
        rows = f"the first {read} rows" if read == end else f"{read} row{'s' if read > 1 else ''}"
        more = [f"and {bad - len(listed)} more"] if bad > len(listed) else []
        head = f"{self.name}: {bad} bad rows in {rows}, more than data.max_bad_rows={self._max_bad_rows}:"
        return DataError("\n  ".join([head, *map(str, listed), *more]))
