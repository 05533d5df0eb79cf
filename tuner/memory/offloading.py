"""Activation offloading: what autograd saves for backward lies on the host until backward wants it.

Each memory is moved once, however many saved tensors are views of it: the input that the q, k and v projections share
counts as one. Parameters stay, and so do tensors too small to be worth a copy. Saved tensors are asked for in about the
reverse order, so the ones before the one that is wanted are brought back ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

MIN_BYTES = 2**18
"""Below it a copy over PCIe takes its latency of some 10 µs and not its bytes."""

AHEAD = 4
"""Memories on their way back before they are wanted. In a layer of LoRA that keeps everything there are about ten."""


class Mover(Protocol):
    """Copies bytes between a device and its host; `tuner.memory.cuda_copies` does so beside the computation."""

    def out(self, device_bytes: Tensor) -> Tensor:
        """A copy on the host of uint8 [n] of the device, which may be given up at once."""

    def begin_back(self, host_bytes: Tensor) -> Any:
        """Begin the way back; what it returns goes to `end_back`."""

    def end_back(self, begun: Any) -> Tensor:
        """The bytes on the device again, for what is computed from now on."""


class _Moved:
    """A memory on the host, and on the device again once it is wanted."""

    def __init__(self, device_bytes: Tensor, mover: Mover, place: int) -> None:
        self.place, self._mover = place, mover
        self._host: Tensor | None = mover.out(device_bytes)
        self._begun: Any = None
        self._back: Tensor | None = None

    def begin_back(self) -> None:
        if self._host is not None:
            self._begun, self._host = self._mover.begin_back(self._host), None

    def bytes(self) -> Tensor:
        """All of it, uint8 [n] on the device."""
        self.begin_back()
        if self._back is None:
            self._back, self._begun = self._mover.end_back(self._begun), None
        return self._back


class _View:
    """One saved tensor: a way to look at a memory."""

    def __init__(self, tensor: Tensor, moved: _Moved) -> None:
        self.moved, self._dtype = moved, tensor.dtype
        self._where = tensor.size(), tensor.stride(), tensor.storage_offset()

    def tensor(self) -> Tensor:
        return self.moved.bytes().view(self._dtype).as_strided(*self._where)


class Offloading:
    """What one forward pass saves; `pack` and `unpack` are autograd's hooks.

    Args:
        stay: tensors whose memory is never moved.
        mover: copies.
        min_bytes: smaller memories stay.
    """

    def __init__(self, stay: list[Tensor], mover: Mover, min_bytes: int = MIN_BYTES) -> None:
        self._stay: Any = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in stay})
        self._mover, self._min_bytes = mover, min_bytes
        self._moved: Any = WeakIdKeyDictionary()  # by storage: an address alone may be another tensor's by now
        self._order: list[ref[_Moved]] = []

    def pack(self, tensor: Tensor) -> Tensor | _View:
        storage = tensor.untyped_storage()
        if storage.nbytes() < self._min_bytes or storage in self._stay:
            return tensor
        if storage not in self._moved:
            moved = _Moved(_bytes_of(tensor), self._mover, len(self._order))
            self._moved[storage] = moved
            self._order.append(ref(moved))
        return _View(tensor, self._moved[storage])

    def unpack(self, packed: Tensor | _View) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        place = packed.moved.place
        for other in reversed(self._order[max(0, place - AHEAD) : place + 1]):
            if (moved := other()) is not None:
                moved.begin_back()
        return packed.tensor()


def _bytes_of(tensor: Tensor) -> Tensor:
    """The whole memory that a tensor looks at, uint8 [n]."""
    whole = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return whole.view(torch.uint8)


def offload(model: nn.Module, new_mover: Callable[[], Mover], min_bytes: int = MIN_BYTES) -> None:
    """Let `model.hidden` move what it saves while it trains; in place."""
    hidden: Callable[..., Tensor] = model.hidden  # type: ignore[assignment]

    @wraps(hidden)
    def offloaded(*args: Any, **kwargs: Any) -> Tensor:
        if not (model.training and torch.is_grad_enabled()):
            return hidden(*args, **kwargs)
        saved = Offloading([*model.parameters(), *model.buffers()], new_mover(), min_bytes)
        with saved_tensors_hooks(saved.pack, saved.unpack):
            return hidden(*args, **kwargs)

    model.hidden = offloaded  # type: ignore[assignment]
