"""Time and memory of a run."""

from __future__ import annotations

import resource
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path

import torch

from tuner.types import Summary

RECENT_STEPS = 10


class Speed:
    """Tokens a second while training: evaluation, saving and generation do not count."""

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)

    def add(self, tokens: int, seconds: float) -> None:
        """Count one step."""
        self._tokens += tokens
        self._seconds += seconds
        self._recent.append((tokens, seconds))

    @property
    def mean(self) -> float | None:
        """Over all steps; None before the first."""
        return self._tokens / self._seconds if self._seconds else None

    @property
    def recent(self) -> float:
        """Over the last ten steps."""
        return sum(tokens for tokens, _ in self._recent) / sum(seconds for _, seconds in self._recent)


def peak_memory_mib(device: torch.device) -> float:
    """CUDA: the most that was allocated at once; CPU: the largest resident set, both since `reset_peak_memory`.

    Where the system cannot reset it (macOS), the largest resident set since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def record_peak(summary: Summary, device: torch.device) -> None:
    """Keep the peak so far in the summary."""
    summary.peak_memory_mib = peak_memory_mib(device)
    summary.peak_tensor_mib = summary.peak_memory_mib if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement, so that a second run in one process does not report the first one's peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # a kernel without it goes on measuring since the process began
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM becomes the current resident set
