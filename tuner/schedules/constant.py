"""The full learning rate at every step, after a linear warm-up."""

from __future__ import annotations

from tuner.schedules.warmup import warmup_factor
from tuner.types import NonNegativeInt


class Constant:
    """Stays at the full learning rate.

    Args:
        warmup_steps: optimizer steps over which the learning rate grows to its full value.
    """

    def __init__(self, warmup_steps: NonNegativeInt) -> None:
        self.warmup_steps = warmup_steps

    def factor(self, step: int, total_steps: int) -> float:
        """What the learning rate is multiplied with at optimizer step `step`, counted from 0."""
        return warmup_factor(step, self.warmup_steps) if step < self.warmup_steps else 1.0
