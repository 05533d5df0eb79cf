"""What the schedules share: how the learning rate grows, and how far it is on the way down.

A schedule is a pure function of the step and keeps no state, so a resumed run continues it exactly.

transformers (and torchtune after it) warms up by `step / warmup_steps`: its first step has learning rate 0
and changes nothing. Here the first of w steps has 1/w and the last the full rate, so warm-up runs one step ahead of
theirs; from `step == warmup_steps` on the factors are the same. The end of the way down, `step == total_steps`, lies
one past the last step: no step is spent on a learning rate of 0.
"""

from __future__ import annotations

import math


def warmup_length(steps: int | None, ratio: float, total_steps: int) -> int:
    """Steps of the warm-up: as given, else `ratio` of the run rounded up, so that a run of any length has one."""
    return math.ceil(ratio * total_steps) if steps is None else steps


def warmup_factor(step: int, warmup_steps: int) -> float:
    """1/w, 2/w, ..., 1 for step 0, 1, ..., w - 1."""
    return (step + 1) / warmup_steps


def decay_progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """0 at the first step after warm-up, 1 at `total_steps` and for every step after it."""
    return min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
