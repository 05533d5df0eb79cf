"""A straight line from the full learning rate down, after a linear warm-up."""

from __future__ import annotations

from tuner.schedules.warmup import decay_progress, warmup_factor, warmup_length
from tuner.types import Fraction, NonNegativeInt


class Linear:
    """Falls by the same amount each step, towards `min_lr_ratio`.

    Args:
        warmup_steps: optimizer steps over which the learning rate grows to its full value; None goes by `warmup_ratio`.
        warmup_ratio: the same as a share of the run.
        min_lr_ratio: what the schedule falls to, as a share of the learning rate.
    """

    def __init__(self, warmup_steps: NonNegativeInt | None, warmup_ratio: Fraction, min_lr_ratio: Fraction) -> None:
        self.warmup_steps = warmup_steps
        self.warmup_ratio = warmup_ratio
        self.min_lr_ratio = min_lr_ratio

    def factor(self, step: int, total_steps: int) -> float:
        """What the learning rate is multiplied with at optimizer step `step`, counted from 0."""
        warmup_steps = warmup_length(self.warmup_steps, self.warmup_ratio, total_steps)
        if step < warmup_steps:
            return warmup_factor(step, warmup_steps)
        share = 1.0 - decay_progress(step, total_steps, warmup_steps)
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * share
