"""AdamW of PyTorch (Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101)."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from tuner.optimizers.betas import checked
from tuner.types import NonNegativeFloat, PositiveFloat


def adamw(
    params: ParamsT,
    lr: PositiveFloat,
    betas: list[float],
    eps: PositiveFloat,
    weight_decay: NonNegativeFloat,
    fused: bool,
) -> torch.optim.AdamW:
    """`torch.optim.AdamW`; its state is two tensors of each parameter's shape and dtype."""
    return torch.optim.AdamW(params, lr=lr, betas=checked(betas), eps=eps, weight_decay=weight_decay, fused=fused)
