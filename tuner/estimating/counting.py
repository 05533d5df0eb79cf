"""Which bytes are alive when, and what they are: a count over the storages that a step makes and drops.

The step runs on fake tensors, which have shapes and storages and no numbers (`torch._subclasses.fake_tensor`). A
storage is counted from the operation that makes it until the last tensor over it is dropped, as an allocator sees it.
PyTorch's own `MemTracker` was not taken: it fails where gradients are added up over several batches, and it makes a
step ten times as slow.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Region = tuple[str, ...]
"""A part of a step, as `("backward", "0", "layer", "3")`."""

PAGED = "paged_state"
"""The kind of what the driver moves out of a GPU that runs short: it takes no room of what has to fit."""

UNCOUNTED = {torch.ops.aten.detach.default, torch.ops.aten.view.default}
"""Operations that make no storage, passed by because they are most of all."""


SUM = torch.ops.aten.add.Tensor
ENGINE = _engine_run_backward.__code__
PYTORCH = str(Path(torch.__file__).parent)


class Allocation:
    """One storage; `kind` is what it turned out to be, None for what comes and goes."""

    __slots__ = ("kind", "num_bytes", "region")

    def __init__(self, num_bytes: int, region: Region) -> None:
        self.num_bytes, self.region = num_bytes, region
        self.kind: str | None = None


class MemoryCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every storage that an operation makes while this is entered.

    Args:
        rounding: bytes that the allocator rounds up to a multiple of.
        inside: bytes that an operation takes inside itself and gives back, by operation, from its arguments and output.

    Attributes:
        region: of what follows.
    """

    def __init__(self, rounding: int, inside: Mapping[Any, Callable[..., int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.region: Region = ("before",)
        self._rounding, self._inside = rounding, inside
        self._is_here = True
        self._events: list[tuple[Region, Allocation, int]] = []
        self._alive: dict[int, tuple[Allocation, weakref.ref[Any]]] = {}
        self._sum: tuple[Allocation, set[int]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in UNCOUNTED or not self._is_here:
            return out
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        if func is SUM and called_by_autograd():
            self._sum = (self._events[-1][1], {id(each.untyped_storage()) for each in args if isinstance(each, Tensor)})
        if (taken := self._inside.get(func)) is not None:
            passing = Allocation(taken(args, kwargs or {}, out), self.region)
            self._events += [(self.region, passing, 1), (self.region, passing, -1)]
        return out

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return
        size = -(-storage.nbytes() // self._rounding) * self._rounding
        allocation = Allocation(size, self.region)
        self._alive[key] = (allocation, weakref.ref(storage, lambda _: self._dropped(key)))
        self._events.append((self.region, allocation, 1))

    def _dropped(self, key: int) -> None:
        """A gradient that autograd adds another to, and nobody else has, is where it puts the sum; of fake tensors it
        makes a new one and drops both (`accumulate` in torch/csrc/autograd/input_buffer.cpp)."""
        allocation, _ = self._alive.pop(key)
        event = (self.region, allocation, -1)
        made, summed = self._sum or (None, set())
        if made is self._events[-1][1] and key in summed and made.num_bytes == allocation.num_bytes:
            self._events.insert(-1, event)
        else:
            self._events.append(event)

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what tensors are, counting those that are not yet counted."""
        for tensor in tensors:
            self.add(tensor)
            self._alive[id(tensor.untyped_storage())][0].kind = kind

    def mark_alive(self, kind: str, made_in: Callable[[Region], bool]) -> None:
        """Say what all those alive are that nothing was said of and that were made in certain regions."""
        for allocation, _ in self._alive.values():
            if allocation.kind is None and made_in(allocation.region):
                allocation.kind = kind

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Count nothing until this is left: what is made is not on the device."""
        before, self._is_here = self._is_here, False
        yield
        self._is_here = before

    @contextmanager
    def within(self, region: Region) -> Iterator[None]:
        """Count as `region` until this is left."""
        before, self.region = self.region, region
        yield
        self.region = before

    def peaks(self, passing: Callable[[Region], str]) -> dict[Region, dict[str, int]]:
        """Of each region, what is alive when most is, in bytes by kind.

        Args:
            passing: the kind of an allocation of which nothing was said, by the region that made it.
        """
        now: Counter[str] = Counter()
        total, largest = 0, defaultdict[Region, int](int)
        found: dict[Region, dict[str, int]] = {}
        for region, allocation, sign in self._events:
            kind = allocation.kind or passing(allocation.region)
            now[kind] += sign * allocation.num_bytes
            total += 0 if kind == PAGED else sign * allocation.num_bytes
            if total > largest[region]:
                largest[region], found[region] = total, dict(now)
        return found


def called_by_autograd() -> bool:
    """Whether the operation that is dispatched is one of autograd's engine, and not of a function's backward pass."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not ENGINE:
        code = frame.f_code
        if code.co_name != "__torch_dispatch__" and not code.co_filename.startswith(PYTORCH):
            return False
        frame = frame.f_back
    return frame is not None
