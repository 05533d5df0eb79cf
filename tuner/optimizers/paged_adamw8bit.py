"""AdamW with 8-bit state that the GPU driver moves to host memory when the GPU runs out (QLoRA's own choice)."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from tuner.optimizers.betas import checked
from tuner.optimizers.groups import NoDecay, Trained, groups
from tuner.optimizers.paging import set_up_paging
from tuner.quiet import import_bitsandbytes
from tuner.types import NonNegativeFloat, NonNegativeInt, PositiveFloat


def paged_adamw8bit(
    params: Sequence[Trained],
    lr: PositiveFloat,
    betas: list[float],
    eps: PositiveFloat,
    weight_decay: NonNegativeFloat,
    min_8bit_size: NonNegativeInt,
    loraplus_lr_ratio: PositiveFloat | None,
    no_decay: NoDecay,
) -> Optimizer:
    """`bitsandbytes.optim.PagedAdamW8bit`: 8-bit state in CUDA managed memory; on a CPU no paging, which is said.

    Args:
        min_8bit_size: parameters with fewer elements keep their state in 32 bits.
    """
    optim = import_bitsandbytes().optim
    optimizer: Optimizer = optim.PagedAdamW8bit(
        groups(params, lr, loraplus_lr_ratio, no_decay),
        lr=lr,
        betas=checked(betas),
        eps=eps,
        weight_decay=weight_decay,
        min_8bit_size=min_8bit_size,
    )
    set_up_paging(optimizer)
    return optimizer
