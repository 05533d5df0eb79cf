"""Lion with 8-bit state of bitsandbytes (Chen et al. 2023, https://arxiv.org/abs/2302.06675)."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from tuner.optimizers.betas import checked
from tuner.optimizers.groups import NoDecay, Trained, groups
from tuner.quiet import import_bitsandbytes
from tuner.types import NonNegativeFloat, NonNegativeInt, PositiveFloat


def lion8bit(
    params: Sequence[Trained],
    lr: PositiveFloat,
    betas: list[float],
    weight_decay: NonNegativeFloat,
    min_8bit_size: NonNegativeInt,
    loraplus_lr_ratio: PositiveFloat | None,
    no_decay: NoDecay,
) -> Optimizer:
    """`bitsandbytes.optim.Lion8bit`: one byte of state a parameter, in blocks of 256.

    Every number moves by exactly `lr` in each step, up or down.

    Args:
        betas: of the average of which the sign is taken, and of the one that is kept.
        min_8bit_size: parameters with fewer elements keep their state in 32 bits.
    """
    optim = import_bitsandbytes().optim
    optimizer: Optimizer = optim.Lion8bit(
        groups(params, lr, loraplus_lr_ratio, no_decay),
        lr=lr,
        betas=checked(betas),
        weight_decay=weight_decay,
        min_8bit_size=min_8bit_size,
    )
    return optimizer
