"""AdEMAMix with 8-bit state that the GPU driver moves to host memory when the GPU runs out."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from tuner.optimizers.betas import checked_three
from tuner.optimizers.groups import NoDecay, Trained, groups
from tuner.optimizers.paging import set_up_paging
from tuner.quiet import import_bitsandbytes
from tuner.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


def paged_ademamix8bit(
    params: Sequence[Trained],
    lr: PositiveFloat,
    betas: list[float],
    alpha: NonNegativeFloat,
    t_alpha: PositiveInt | None,
    t_beta3: PositiveInt | None,
    eps: PositiveFloat,
    weight_decay: NonNegativeFloat,
    min_8bit_size: NonNegativeInt,
    loraplus_lr_ratio: PositiveFloat | None,
    no_decay: NoDecay,
) -> Optimizer:
    """`bitsandbytes.optim.PagedAdEMAMix8bit`: 8-bit state in CUDA managed memory; on a CPU no paging, which is said.

    Args:
        betas: of the fast average, of the squares, and of the slow average.
        alpha: weight of the slow average in a step.
        t_alpha: steps over which `alpha` grows from 0; null: it is there from the first.
        t_beta3: steps over which the decay of the slow average goes from that of the fast one to its own.
        min_8bit_size: parameters with fewer elements keep their state in 32 bits.
    """
    optim = import_bitsandbytes().optim
    optimizer: Optimizer = optim.PagedAdEMAMix8bit(
        groups(params, lr, loraplus_lr_ratio, no_decay),
        lr=lr,
        betas=checked_three(betas, t_beta3),
        alpha=alpha,
        t_alpha=t_alpha,
        t_beta3=t_beta3,
        eps=eps,
        weight_decay=weight_decay,
        min_8bit_size=min_8bit_size,
    )
    set_up_paging(optimizer)
    return optimizer
