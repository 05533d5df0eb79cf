"""The full learning rate at every step, after a linear warm-up."""

from __future__ import annotations

from tuner.schedules.warmup import warmup_factor, warmup_length
from tuner.types import Fraction, NonNegativeInt


class Constant:
    """Stays at the full learning rate.

    Args:
        warmup_steps: optimizer steps over which the learning rate grows to its full value; None goes by `warmup_ratio`.
        warmup_ratio: the same as a share of the run.
    """

    def __init__(self, warmup_steps: NonNegativeInt | None, warmup_ratio: Fraction) -> None:
        self.warmup_steps = warmup_steps
        self.warmup_ratio = warmup_ratio

    def factor(self, step: int, total_steps: int) -> float:
        """What the learning rate is multiplied with at optimizer step `step`, counted from 0."""
        warmup_steps = warmup_length(self.warmup_steps, self.warmup_ratio, total_steps)
        return warmup_factor(step, warmup_steps) if step < warmup_steps else 1.0
