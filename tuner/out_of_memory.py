"""What an error that says a device or its host has no memory left looks like, and how a run says it.

PyTorch's allocators, CUDA's libraries and the operating system each say it in their own way, and what builds objects
from a configuration wraps what they raise.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from tuner.errors import OutOfMemory

WORDS = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
"""What a plain `RuntimeError` of PyTorch then has in it: PyTorch on a CPU; the driver, cuBLAS and cuDNN, who ask beside
PyTorch's allocator; C++."""

ADVICE = "`python -m tuner estimate` with the words of the run says what fits"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory that could not be had is what was raised, or the cause of it."""
    return _culprit(error) is not None


def out_of_memory_said(error: BaseException) -> str:
    """An error that `is_out_of_memory` as one line that begins with `out of memory`."""
    culprit = _culprit(error)
    return str(culprit) if isinstance(culprit, OutOfMemory) else f"out of memory: {what_was_asked(error)}; {ADVICE}"


def what_was_asked(error: BaseException) -> str:
    """What the allocator says of the memory that it could not give, without its statistics."""
    culprit = _culprit(error) or error
    line = next(iter(str(culprit).splitlines()), "") or type(culprit).__name__
    _, on_a_cpu, size = line.partition("DefaultCPUAllocator: ")
    of_a_gpu, free, _ = line.partition(" is free.")  # behind it is who has the rest, which fills some lines
    return f"{on_a_cpu}{size}".rstrip(".") if on_a_cpu else f"{of_a_gpu}{free}".rstrip(".")


@contextmanager
def ends_as_out_of_memory(when: str | None = None) -> Iterator[None]:
    """Raise `OutOfMemory` for memory that could not be had in the block, with nothing of the block kept alive.

    Args:
        when: what was done, and why it ends there, for the message; None where only the error knows.

    Raises:
        OutOfMemory: as `without_frames` makes it.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = f"out of memory: {when}: {what_was_asked(error)}; {ADVICE}" if when else out_of_memory_said(error)
        raise without_frames(error, said) from None


def without_frames(error: BaseException, said: str) -> OutOfMemory:
    """What is raised in the place of an error that is kept, as by a sweep's next trial in the same process.

    A traceback keeps the frames it goes through, and they keep activations: it becomes a note, which is text.

    Args:
        error: loses its traceback, and so do its causes.
        said: the message.
    """
    told = OutOfMemory(said)
    told.add_note("".join(traceback.format_exception(error)).rstrip())
    for each in _with_all_behind(error):
        each.__traceback__ = None
    return told


def _culprit(error: BaseException) -> BaseException | None:
    """The error, or the first of its causes, that says memory could not be had."""
    return next((each for each in _with_causes(error) if _says_so(each)), None)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, the cause of that, and so on; an error may be its own cause (`raise error from error`)."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        yield each
        seen.add(id(each))
        each = each.__cause__


def _with_all_behind(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it was raised from or while handling."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            yield each
            seen.add(id(each))
            waiting += [each.__cause__, each.__context__]


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    import torch  # what has raised it has imported it, in every case that matters

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in WORDS)
