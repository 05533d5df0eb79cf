"""Which files `data.path` means, and who reads each kind."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from tuner.data.csv_files import csv_rows
from tuner.data.json_files import json_rows
from tuner.data.parquet_files import parquet_rows
from tuner.data.records import Row
from tuner.errors import DataError

KINDS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}


def files_of(key: str, path: str, *, aloud: bool = True) -> list[Path]:
    """The files that a path names, sorted: one file, those of a folder that are of a known kind, or those of a pattern.

    Other files of a folder are left out aloud, hidden ones (`.name`, `_name`) silently; its folders are not entered.

    Raises:
        DataError: there are none, one that is named is of no known kind, or they are of different kinds.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        inside = sorted(file for file in place.iterdir() if file.is_file() and file.name[0] not in "._")
        files = [file for file in inside if file.suffix.lower() in KINDS]
        others = [file.name for file in inside if file not in files]
        if others and files and aloud:
            print(f"{key}: {path}: left out, being none of {', '.join(KINDS)}: {_some(others)}", file=sys.stderr)
        if not files:
            raise DataError(f"{key}: {path} is a folder without any {', '.join(KINDS)} file; it holds {_some(others)}")
    elif place.is_file() or not has_magic(path):
        files = [place]
    else:
        files = sorted(found for name in glob(str(place), recursive=True) if (found := Path(name)).is_file())
        if not files:
            raise DataError(f"{key}: {path} fits no file (looked in {place.absolute().parent})")
    _require_one_kind(key, path, files)
    return files


def _require_one_kind(key: str, path: str, files: list[Path]) -> None:
    for file in files:
        if not file.is_file():
            what = "is no regular file" if file.exists() else f"does not exist (looked for {file.absolute()})"
            raise DataError(f"{key}: {file} {what}; give a {', '.join(KINDS)} file, a folder of them or a pattern")
        if file.suffix.lower() not in KINDS:
            raise DataError(f"{key}: {file}: of no known kind; its name has to end in {', '.join(KINDS)}")
    examples = {file.suffix.lower(): file.name for file in reversed(files)}
    if len(examples) > 1:
        named = ", ".join(f"{kind} ({examples[kind]})" for kind in sorted(examples))
        raise DataError(f"{key}: {path} holds files of different kinds: {named}; name one kind, as 'FOLDER/*.csv'")


@dataclass(frozen=True)
class FileRows:
    """The rows of all files that a key names, file after file.

    Args:
        key: as `data.path`.
        path: its value, see `files_of`.
    """

    key: str
    path: str

    def __iter__(self) -> Iterator[Row]:
        """One pass.

        Raises:
            DataError: as `files_of`; a file cannot be read, or holds no row.
        """
        for file in files_of(self.key, self.path):
            with _readable(file):
                rows = KINDS[file.suffix.lower()](file)
                first = next(rows, None)
                if first is None:
                    raise DataError(f"{file}: the file holds no examples")
                yield first
                yield from rows

    def content_digest(self) -> str:
        """Of kind and bytes of each file in order, not of their names.

        Raises:
            DataError: as `files_of`, or a file cannot be read.
        """
        parts = []
        for file in files_of(self.key, self.path, aloud=False):
            with _readable(file), file.open("rb") as stream:
                parts.append(f"{file.suffix.lower()} {hashlib.file_digest(stream, 'sha256').hexdigest()}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "no file"
