"""Time and memory of a run."""

from __future__ import annotations

import sys

import pytest
import torch

from tuner.measure import RECENT_STEPS, Speed, peak_memory_mib, reset_peak_memory

CPU = torch.device("cpu")


def test_speed_is_tokens_over_seconds_and_the_recent_one_forgets() -> None:
    speed = Speed()
    speed.add(1000, 1.0)
    for _ in range(RECENT_STEPS):
        speed.add(100, 1.0)
    assert speed.recent == 100.0
    assert speed.mean == pytest.approx((1000 + 100 * RECENT_STEPS) / (1 + RECENT_STEPS))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak of a process")
def test_a_second_run_in_one_process_has_its_own_peak() -> None:
    reset_peak_memory(CPU)
    before = peak_memory_mib(CPU)
    large = torch.ones(100 * 2**20)  # 400 MiB
    assert peak_memory_mib(CPU) > before + 350
    del large
    reset_peak_memory(CPU)
    assert peak_memory_mib(CPU) < before + 100
