"""Everything in bfloat16 and updates rounded to it at random, so that small ones are not lost."""

from __future__ import annotations

from typing import Literal

from tuner.types import Precision


def bf16_stochastic(trainable: Literal["auto", "bf16"]) -> Precision:
    """As `bf16`, with stochastic rounding of what trains (see `tuner.precision.stochastic_rounding`).

    Args:
        trainable: `bf16`; `auto`, which means fp32 for adapters and so leaves nothing to round, is for full training.
    """
    return Precision(name="bf16_stochastic", compute="bfloat16", trainable=trainable, stochastic_rounding=True)
