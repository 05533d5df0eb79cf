"""Records of local files: JSON lines, or one JSON array, with the place of each for error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.errors import DataError


@dataclass(frozen=True)
class Record:
    """One JSON object and where it was read: `FILE:LINE`, or `FILE: item N` within an array."""

    fields: dict[str, Any]
    origin: str

    def text(self, column: str) -> str:
        """The text in `column`.

        Raises:
            DataError: if there is no such column (naming those that exist), or it holds something else.
        """
        if column not in self.fields:
            found = ", ".join(self.fields) or "none"
            raise DataError(f"{self.origin}: no column {column!r}; found: {found}")
        value = self.fields[column]
        if not isinstance(value, str):
            raise DataError(f"{self.origin}: column {column!r} holds {json_type(value)}, not a text")
        return value


def read_records(path: str) -> list[Record]:
    """Every record of a `.jsonl` file, or of a `.json` file that holds one array.

    The content decides which it is, not the name. Empty lines are passed over.

    Raises:
        DataError: if there is no such file, it holds no record, or something in it is not a JSON object.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder, not a file" if file.is_dir() else f"does not exist (looked for {file.absolute()})"
        raise DataError(f"data.path: {path} {what}; give a .jsonl or .json file")
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    records = list(_array(content, path) if content.lstrip().startswith(b"[") else _lines(content, path))
    if not records:
        raise DataError(f"{path}: the file holds no examples")
    return records


def _lines(content: bytes, path: str) -> Iterator[Record]:
    # At \n alone: str.splitlines would also cut at characters that may stand within a JSON text
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield _record(_decode(line, path, number), f"{path}:{number}")


def _array(content: bytes, path: str) -> Iterator[Record]:
    for number, item in enumerate(_decode(content, path, 1), start=1):
        yield _record(item, f"{path}: item {number}")


def _decode(content: bytes, path: str, first_line: int) -> Any:
    try:
        value = json.loads(content.decode("utf-8"))
        if b"\\ud" in content.lower():  # half a surrogate pair, written as an escape, is no character
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError as error:
        raise DataError(f"{path}:{first_line}: holds half of a surrogate pair, which is no text") from error
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x})") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}:{line}: not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{path}:{first_line}: nested too deeply") from error


def _record(item: Any, origin: str) -> Record:
    if not isinstance(item, dict):
        raise DataError(f"{origin}: {json_type(item)}, not a JSON object such as {{...}}")
    return Record(item, origin)


def json_type(value: Any) -> str:
    """What JSON calls the type of `value`, with its article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names[type(value)]
