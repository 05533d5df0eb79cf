"""Half a cosine from the full learning rate down, after a linear warm-up."""

from __future__ import annotations

import math

from tuner.schedules.warmup import decay_progress, warmup_factor, warmup_length
from tuner.types import Fraction, NonNegativeInt


class Cosine:
    """Falls slowly, then fast, then slowly to `min_lr_ratio` (SGDR without restarts, https://arxiv.org/abs/1608.03983).

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
        share = 0.5 * (1.0 + math.cos(math.pi * decay_progress(step, total_steps, warmup_steps)))
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * share
