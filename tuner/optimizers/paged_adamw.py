"""AdamW of bitsandbytes whose state the GPU driver moves to host memory when the GPU runs out."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from tuner.optimizers.betas import checked
from tuner.optimizers.groups import NoDecay, Trained, groups
from tuner.optimizers.paging import set_up_paging
from tuner.quiet import import_bitsandbytes
from tuner.types import NonNegativeFloat, PositiveFloat


def paged_adamw(
    params: Sequence[Trained],
    lr: PositiveFloat,
    betas: list[float],
    eps: PositiveFloat,
    weight_decay: NonNegativeFloat,
    loraplus_lr_ratio: PositiveFloat | None,
    no_decay: NoDecay,
) -> Optimizer:
    """`bitsandbytes.optim.PagedAdamW`: 32-bit state in CUDA managed memory; on a CPU plain AdamW, which is said."""
    optim = import_bitsandbytes().optim
    optimizer: Optimizer = optim.PagedAdamW(
        groups(params, lr, loraplus_lr_ratio, no_decay), lr=lr, betas=checked(betas), eps=eps, weight_decay=weight_decay
    )
    set_up_paging(optimizer)
    return optimizer
