"""Copies between a GPU and pinned memory of its host, on a stream of their own beside the computation."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

IN_FLIGHT = 4
"""Memories on their way out that are still held on the device. The computation waits for the oldest beyond that, so a
GPU that computes faster than it copies does not pile them up."""


class CudaCopies:
    """A `Mover` of one forward pass and its backward pass.

    Args:
        device: a CUDA device.
        stream: of the copies.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device, self._stream = device, stream
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def out(self, device_bytes: Tensor) -> Tensor:
        host = torch.empty(device_bytes.shape, dtype=torch.uint8, pin_memory=True)
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            host.copy_(device_bytes, non_blocking=True)
        # Held until copied: what the allocator gives the computation in its place comes after the wait for this event.
        self._leaving.append((self._stream.record_event(), device_bytes))
        while len(self._leaving) > IN_FLIGHT:
            computing.wait_event(self._leaving.popleft()[0])
        return host

    def begin_back(self, host_bytes: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        computing = torch.cuda.current_stream(self._device)
        while self._leaving:  # backward has begun
            computing.wait_event(self._leaving.popleft()[0])
        back = torch.empty(host_bytes.shape, dtype=torch.uint8, device=self._device)  # the computation's memory
        self._stream.wait_stream(computing)  # which may still be using what was there before
        with torch.cuda.stream(self._stream):
            back.copy_(host_bytes, non_blocking=True)
        return back, self._stream.record_event()

    def end_back(self, begun: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        back, copied = begun
        torch.cuda.current_stream(self._device).wait_event(copied)
        return back


class CudaLink:
    """A `Link`: gradients leave on one stream while parameters come back on another, beside the CPU's arithmetic.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._leaving, self._returning = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def like(self, device_tensor: Tensor) -> Tensor:
        return torch.empty_like(device_tensor, device="cpu", pin_memory=True)

    def begin_out(self, device_tensor: Tensor, host_tensor: Tensor) -> torch.cuda.Event:
        self._leaving.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._leaving):
            host_tensor.copy_(device_tensor, non_blocking=True)
        copied: torch.cuda.Event = self._leaving.record_event()
        return copied

    def end_out(self, begun: torch.cuda.Event) -> None:
        begun.synchronize()  # CPU-GPU sync point: the CPU is to read it

    def begin_back(self, host_tensor: Tensor, device_tensor: Tensor) -> None:
        self._returning.wait_stream(torch.cuda.current_stream(self._device))  # which may still read the old values
        with torch.cuda.stream(self._returning):
            device_tensor.copy_(host_tensor, non_blocking=True)

    def end_back(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._returning)
