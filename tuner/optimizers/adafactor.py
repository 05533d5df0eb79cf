"""Adafactor of PyTorch (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch

from tuner.errors import ConfigError
from tuner.optimizers.groups import NoDecay, Trained, groups
from tuner.types import NonNegativeFloat, PositiveFloat

AtLeastOne = Annotated[float, ">= 1"]
NotPositive = Annotated[float, "<= 0"]


def adafactor(
    params: Sequence[Trained],
    lr: PositiveFloat,
    beta2_decay: NotPositive,
    eps: list[NonNegativeFloat | None],
    d: AtLeastOne,
    weight_decay: NonNegativeFloat,
    loraplus_lr_ratio: PositiveFloat | None,
    no_decay: NoDecay,
) -> torch.optim.Adafactor:
    """`torch.optim.Adafactor`; of a matrix [m, n] its state is m + n numbers, of a vector one each.

    A step is relative: `lr` (or 1 / sqrt(step), if that is less) times the root mean square of the parameter.

    Args:
        beta2_decay: exponent of the step in the decay rate of the squared gradient's average.
        eps: the least that is divided by, null for the dtype's own epsilon; and the least root mean square of a
            parameter that a step is relative to, which is what lets a matrix of zeros, as LoRA's B, begin to move.
        d: a step whose root mean square is larger than this is scaled down to it.

    Raises:
        ConfigError: if `eps` is not two values, the second a number.
    """
    if len(eps) != 2 or eps[1] is None:
        raise ConfigError(f"optimizer.eps={list(eps)}: must be two values, the second a number, as [null, 1e-3]")
    return torch.optim.Adafactor(
        groups(params, lr, loraplus_lr_ratio, no_decay),
        lr=lr,
        beta2_decay=beta2_decay,
        eps=(eps[0], eps[1]),
        d=d,
        weight_decay=weight_decay,
    )
