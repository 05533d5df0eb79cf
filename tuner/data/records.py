"""Rows of data as they were read: named values, and the place of each for error messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tuner.errors import DataError

MAX_ROW_MIB = 16
"""A longer row is refused: no conversation is that long, and a file without line ends is one row."""

MAX_ROW_BYTES = MAX_ROW_MIB << 20


@dataclass(frozen=True)
class Record:
    """The columns of one row and where it was read: `FILE:LINE`, or `FILE: row N` where rows are no lines."""

    fields: Mapping[str, Any]
    origin: str

    def value(self, column: str) -> Any:
        """What is in `column`.

        Raises:
            DataError: there is no such column, naming those that exist.
        """
        if column not in self.fields:
            found = ", ".join(map(str, self.fields)) or "none"
            raise DataError(f"{self.origin}: no column {column!r}; found: {found}")
        return self.fields[column]

    def text(self, column: str) -> str:
        """The text in `column`.

        Raises:
            DataError: there is no such column, or it holds something else.
        """
        value = self.value(column)
        if not isinstance(value, str):
            raise DataError(f"{self.origin}: column {column!r} holds {json_type(value)}, not a text")
        return value

    def text_if_any(self, column: str | None) -> str:
        """The text in a column that a row may lack; empty where it does, where it holds null and where none is named.

        Raises:
            DataError: it holds something else.
        """
        return "" if column is None or self.fields.get(column) is None else self.text(column)

    def list_of(self, column: str, what: str) -> list[Any]:
        """The list in `column`, of at least one.

        Raises:
            DataError: there is no such column, or it holds something else.
        """
        value = self.value(column)
        if not isinstance(value, list) or not value:
            held = "an empty list" if value == [] else json_type(value)
            raise DataError(f"{self.origin}: column {column!r} holds {held}, not a list of {what}")
        return value


Row: TypeAlias = Record | DataError
"""What a reader yields: a row, or what is wrong with one beyond which it can read on. What ends a file, it raises."""


def row_of(item: Any, origin: str) -> Row:
    """A row from a value that should be an object."""
    if isinstance(item, dict):
        return Record(item, origin)
    return DataError(f"{origin}: {json_type(item)}, not a JSON object such as {{...}}")


def json_type(value: Any) -> str:
    """What JSON calls the type of `value`, with its article; what JSON has no word for, as Python calls it."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def too_long(origin: str, hint: str) -> DataError:
    return DataError(f"{origin}: a row of more than {MAX_ROW_MIB} MiB; {hint}")


def require_different(file: Path, names: list[str]) -> None:
    """Refuse a table of which two columns have one name."""
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise DataError(f"{file}: two columns are called {twice[0]!r}")
