"""Time and memory of a run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tuner.measure import RECENT_STEPS, Speed

TWO_RUNS = """
import torch
from tuner.measure import peak_memory_mib, reset_peak_memory
cpu = torch.device("cpu")
reset_peak_memory(cpu)
print(peak_memory_mib(cpu))
large = torch.ones(100 * 2**20)  # 400 MiB
print(peak_memory_mib(cpu))
del large
reset_peak_memory(cpu)
print(peak_memory_mib(cpu))
"""


def test_speed_is_tokens_over_seconds_and_the_recent_one_forgets() -> None:
    speed = Speed()
    speed.add(1000, 1.0)
    for _ in range(RECENT_STEPS):
        speed.add(100, 1.0)
    assert speed.recent == 100.0
    assert speed.mean == pytest.approx((1000 + 100 * RECENT_STEPS) / (1 + RECENT_STEPS))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak of a process")
def test_a_second_run_in_one_process_has_its_own_peak() -> None:
    """In a process of its own: what other tests have left in this one may keep memory that was given back."""
    done = subprocess.run([sys.executable, "-c", TWO_RUNS], capture_output=True, text=True, check=True)
    before, first, second = map(float, done.stdout.split())
    assert first > before + 350
    assert second < before + 100
