"""One process at a time in a run folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tuner.errors import CheckpointError, RunBusy

LOCK = ".lock"

_held: set[int] = set()
"""Descriptors of the locks of this process, which a forked child closes."""


@contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Hold the run folder `out` until the block ends, made if it is not there and, if nothing was written, taken away.

    The operating system keeps the lock (flock): it ends with the process, however that dies. A child does not have it,
    neither one that runs another program nor one that is forked, so a child that outlives a killed run keeps nobody
    out; and a forked child that leaves the block lets nothing go.

    Raises:
        RunBusy: another process holds `out`.
        CheckpointError: it cannot be written to.
    """
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(out / LOCK)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made a run folder: {error.strerror}") from error
    if descriptor is None:
        raise RunBusy(f"{out}: another process is at work on this run; wait for its end, or give another out")
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:
            (out / LOCK).unlink(missing_ok=True)  # while it is held: whoever opened it meanwhile finds it gone
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that is being forked may have a copy for a moment
            _close(descriptor)
            for folder in new:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def _locked(file: Path) -> int | None:
    """A descriptor of `file` that holds its lock; None where another one does."""
    _watch_forks()
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)  # not inheritable, as all that Python opens
        _held.add(descriptor)  # before it is locked: another thread may fork in between
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return descriptor
            _close(descriptor)  # who had it has ended since it was opened, and took the file away
        except BlockingIOError:
            _close(descriptor)
            return None
        except BaseException:
            _close(descriptor)
            raise


@cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_close_all)


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _close_all() -> None:
    """In a forked child: closing its copies leaves the parent's lock as it is, which unlocking them would not."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()
