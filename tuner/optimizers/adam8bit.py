"""Adam with 8-bit state of bitsandbytes (Dettmers et al. 2021, https://arxiv.org/abs/2110.02861)."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from tuner.optimizers.betas import checked
from tuner.optimizers.groups import NoDecay, Trained, groups
from tuner.quiet import import_bitsandbytes
from tuner.types import NonNegativeFloat, NonNegativeInt, PositiveFloat


def adam8bit(
    params: Sequence[Trained],
    lr: PositiveFloat,
    betas: list[float],
    eps: PositiveFloat,
    weight_decay: NonNegativeFloat,
    min_8bit_size: NonNegativeInt,
    loraplus_lr_ratio: PositiveFloat | None,
    no_decay: NoDecay,
) -> Optimizer:
    """`bitsandbytes.optim.Adam8bit`: two bytes of state a parameter, in blocks of 256.

    bitsandbytes has one kernel for Adam and AdamW: `weight_decay` is decoupled here as well, so with equal keys this is
    `adamw8bit`, and only the default of that key differs.

    Args:
        min_8bit_size: parameters with fewer elements keep their state in 32 bits.
    """
    optim = import_bitsandbytes().optim
    optimizer: Optimizer = optim.Adam8bit(
        groups(params, lr, loraplus_lr_ratio, no_decay),
        lr=lr,
        betas=checked(betas),
        eps=eps,
        weight_decay=weight_decay,
        min_8bit_size=min_8bit_size,
    )
    return optimizer
