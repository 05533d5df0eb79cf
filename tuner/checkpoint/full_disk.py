"""A disk that fills up while a run writes, as one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuner.checkpoint.store import what_remains
from tuner.errors import CheckpointError


@contextmanager
def full_disk_said(out: Path) -> Iterator[None]:
    """Raise `CheckpointError`, with what remains of the run in `out`, for a write that found no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(f"{out}: no room left on the disk; {what_remains(out)}") from error
