"""AdamW of PyTorch (Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tuner.optimizers.betas import checked
from tuner.optimizers.groups import NoDecay, Trained, groups
from tuner.types import NonNegativeFloat, PositiveFloat


def adamw(
    params: Sequence[Trained],
    lr: PositiveFloat,
    betas: list[float],
    eps: PositiveFloat,
    weight_decay: NonNegativeFloat,
    fused: bool,
    loraplus_lr_ratio: PositiveFloat | None,
    no_decay: NoDecay,
) -> torch.optim.AdamW:
    """`torch.optim.AdamW`; its state is two tensors of each parameter's shape and dtype."""
    return torch.optim.AdamW(
        groups(params, lr, loraplus_lr_ratio, no_decay),
        lr=lr,
        betas=checked(betas),
        eps=eps,
        weight_decay=weight_decay,
        fused=fused,
    )
