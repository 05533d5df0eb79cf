"""Mixed precision with float16 and a scaled loss: for GPUs from before bfloat16."""

from __future__ import annotations

from typing import Literal

from tuner.types import PositiveFloat, PositiveInt, Precision


def amp_fp16(
    trainable: Literal["auto", "fp32"], initial_loss_scale: PositiveFloat, growth_interval: PositiveInt
) -> Precision:
    """As `amp_bf16` with float16, which is eight times as exact and overflows at 65,504.

    Args:
        trainable: fp32 either way.
        initial_loss_scale: what the loss is multiplied with at first; halved whenever gradients overflow.
        growth_interval: steps without overflow after which it is doubled.
    """
    return Precision(
        name="amp_fp16",
        compute="float16",
        trainable=trainable,
        weights="float32",
        initial_loss_scale=initial_loss_scale,
        growth_interval=growth_interval,
    )
