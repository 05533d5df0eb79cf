"""AdamW of bitsandbytes whose state the GPU driver moves to host memory when the GPU runs out."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from tuner.optimizers.betas import checked
from tuner.optimizers.paging import warn_on_cpu
from tuner.quiet import import_bitsandbytes
from tuner.types import NonNegativeFloat, PositiveFloat


def paged_adamw(
    params: ParamsT,
    lr: PositiveFloat,
    betas: list[float],
    eps: PositiveFloat,
    weight_decay: NonNegativeFloat,
) -> Optimizer:
    """`bitsandbytes.optim.PagedAdamW`: 32-bit state in CUDA managed memory; on a CPU plain AdamW, which is said."""
    optim = import_bitsandbytes().optim
    optimizer: Optimizer = optim.PagedAdamW(params, lr=lr, betas=checked(betas), eps=eps, weight_decay=weight_decay)
    warn_on_cpu(optimizer)
    return optimizer
