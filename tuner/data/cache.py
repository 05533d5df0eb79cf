"""Prepared data on disk, found again by everything it is made of.

An entry is a folder that is written beside its place under another name and then renamed, so it is there whole or not
at all. Of several processes that want the same one, the first makes it under a lock and the others wait. Every file is
read once and held against the sha256 it was written with before it is used: a damaged entry is said and made anew.
Anything may be deleted at any time: files that are open stay, and what is gone is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuner.data.samples import FILES, read_samples
from tuner.errors import DataError
from tuner.types import Dataset, Dialogue

DESCRIPTION = "entry.json"

_ATTEMPTS = 5


class Damaged(Exception):
    """An entry that is not what was written."""


def cached_dataset(folder: Path, key: str, make: Callable[[Path], None]) -> Dataset:
    """The entry of `key`, made if there is none.

    Args:
        folder: of all entries; made if it is not there.
        key: of everything that the data is made of.
        make: writes the entry into a folder that exists and is empty, by `write_description` at last.

    Raises:
        DataError: the folder cannot be written; or what `make` raises.
    """
    from filelock import FileLock

    entry = folder / key
    for _ in range(_ATTEMPTS):
        try:
            if entry.is_dir() and (found := _read_or_remove(entry)):
                return found
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{key}.lock"):
                if not entry.is_dir():
                    _make(entry, make)
        except OSError as error:
            if not _is_about(folder, error):
                raise
            if isinstance(error, FileNotFoundError):
                continue  # somebody deletes in the folder
            elsewhere = "name another folder as data.cache_dir, or say data.cache=false"
            raise DataError(f"{folder}: the cache of prepared data cannot be used ({error}); {elsewhere}") from error
    raise DataError(f"{folder}: what is written here is gone or damaged at once, {_ATTEMPTS} times; is the disk well?")


def write_description(folder: Path, described: dict[str, Any]) -> None:
    """Make a folder of samples a whole entry.

    Args:
        folder: holds the samples.
        described: the fields of `Dataset` that are no samples, plain.
    """
    sums = {name: _sum(folder / name) for name in FILES}
    content = json.dumps({"files": sums, **described}).encode()
    (folder / DESCRIPTION).write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_entry(folder: Path) -> Dataset:
    """The data of an entry.

    Raises:
        Damaged: saying which file.
        OSError: a file that is gone.
    """
    described = _description(folder / DESCRIPTION)
    for name, expected in described.pop("files").items():
        if _sum(folder / name) != expected:
            raise Damaged(name)
    train, validation = read_samples(folder)
    dialogues = [Dialogue(**dialogue) for dialogue in described.pop("dialogues")]
    return Dataset(train=train, validation=validation, dialogues=dialogues, **described)


def _is_about(folder: Path, error: OSError) -> bool:
    """Whether an error is of writing here, and not of reading the data."""
    path = folder if error.filename is None else Path(error.filename)
    return path.is_relative_to(folder) or folder.is_relative_to(path)


def _description(file: Path) -> dict[str, Any]:
    whole, _, content = file.read_bytes().partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != whole:
        raise Damaged(file.name)
    described: dict[str, Any] = json.loads(content)
    return described


def _read_or_remove(entry: Path) -> Dataset | None:
    try:
        return read_entry(entry)
    except (Damaged, FileNotFoundError) as error:
        if not entry.is_dir():
            raise
        what = Path(error.filename).name + " is missing" if isinstance(error, OSError) else f"{error} is damaged"
        warnings.warn(f"prepared data in {entry}: {what}; it is prepared again", stacklevel=2)
        condemned = entry.with_name(f"{entry.name}.{secrets.token_hex(4)}.unfinished")
        entry.rename(condemned)  # whole: nobody meets half an entry
        shutil.rmtree(condemned, ignore_errors=True)
        return None


def _make(entry: Path, make: Callable[[Path], None]) -> None:
    """Under the lock: what is unfinished is of processes that were killed."""
    for left in entry.parent.glob(f"{entry.name}.*.unfinished"):
        shutil.rmtree(left, ignore_errors=True)
    unfinished = entry.with_name(f"{entry.name}.{os.getpid()}-{secrets.token_hex(4)}.unfinished")
    unfinished.mkdir()
    try:
        make(unfinished)
        if not entry.is_dir():  # the lock may have been deleted too, and another process may have been faster
            unfinished.rename(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
