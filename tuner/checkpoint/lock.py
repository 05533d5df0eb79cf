"""One process at a time in a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuner.errors import CheckpointError

LOCK = ".lock"


@contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Hold the run folder `out` until the block ends, made if it is not there and, if nothing was written, taken away.

    The operating system keeps the lock: it ends with the process, however that dies, and a child does not have it.

    Raises:
        CheckpointError: another process holds `out`, or it cannot be written to.
    """
    from filelock import FileLock, Timeout

    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    lock = FileLock(out / LOCK, blocking=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"{out}: another process is at work on this run; wait for its end, or give another out"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made a run folder: {error.strerror}") from error
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)  # while it is held: whoever opened it meanwhile finds it gone, and fails
        lock.release()
        for folder in new:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
