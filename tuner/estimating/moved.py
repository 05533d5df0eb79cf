"""Activations that are moved to the host and back, as far as they take memory of the device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from tuner.estimating.counting import MemoryCount
from tuner.memory.cuda_copies import IN_FLIGHT


class MovedOnPaper:
    """A `Mover` that copies nothing and holds on the device what `CudaCopies` holds, at most.

    Args:
        count: of the device; the host is not counted.
    """

    def __init__(self, count: MemoryCount) -> None:
        self._count = count
        self._leaving: deque[Tensor] = deque(maxlen=IN_FLIGHT)

    def out(self, device_bytes: Tensor) -> Tensor:
        self._leaving.append(device_bytes)
        with self._count.elsewhere():
            return torch.empty_like(device_bytes)

    def begin_back(self, host_bytes: Tensor) -> Tensor:
        self._leaving.clear()
        back = torch.empty(host_bytes.shape, dtype=torch.uint8)
        self._count.mark([back], "activations")
        return back

    def end_back(self, begun: Tensor) -> Tensor:
        return begun
