"""What a layer keeps of its forward pass when the rest of it is computed again in backward.

PyTorch's own selective checkpointing watches a layer operation by operation and keeps the results of those it is told.
It forbids what our autograd functions live by, writing into a result in its place: kept, it would be the later value.
So they say themselves what is worth keeping (`product`), and where an operation is called that has its autograd from
PyTorch, PyTorch watches that call alone (`kernel`). Outside of such a layer both do nothing. See
`tuner.memory.selective`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Keeping(Protocol):
    """One pass of a layer: the first, which keeps, or the second, which takes what was kept in the same order."""

    def product(self, compute: Callable[[], Tensor]) -> Tensor: ...

    def kernel(self) -> AbstractContextManager[object]: ...


class _Here(threading.local):
    """Of a thread: the backward pass of a GPU has threads of its own."""

    keeping: Keeping | None = None


_HERE = _Here()


def product(compute: Callable[[], Tensor]) -> Tensor:
    """The result of `compute`, not computed twice; nobody writes into it. For use within autograd functions."""
    keeping = _HERE.keeping
    return compute() if keeping is None else keeping.product(compute)


def kernel() -> AbstractContextManager[object]:
    """Within it, matrix products and fused attention that autograd knows are not computed twice."""
    keeping = _HERE.keeping
    return nullcontext() if keeping is None else keeping.kernel()


@contextmanager
def during(keeping: Keeping) -> Iterator[None]:
    """Let `keeping` decide within it."""
    before, _HERE.keeping = _HERE.keeping, keeping
    try:
        yield
    finally:
        _HERE.keeping = before
