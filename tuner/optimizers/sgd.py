"""Stochastic gradient descent of PyTorch, with momentum (Sutskever et al. 2013).

There is no key `fused`: on a CPU the fused kernel of PyTorch 2.12 and 2.13 leaves bf16 parameters as they are, without
a word (https://github.com/pytorch/pytorch/issues/191763), and SGD is no part of a step's time that anyone would notice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tuner.errors import ConfigError
from tuner.optimizers.groups import NoDecay, Trained, groups
from tuner.types import Fraction, NonNegativeFloat, PositiveFloat


def sgd(
    params: Sequence[Trained],
    lr: PositiveFloat,
    momentum: Fraction,
    nesterov: bool,
    weight_decay: NonNegativeFloat,
    loraplus_lr_ratio: PositiveFloat | None,
    no_decay: NoDecay,
) -> torch.optim.SGD:
    """`torch.optim.SGD`; its state is one tensor of each parameter's shape and dtype, none without momentum.

    Raises:
        ConfigError: if `nesterov` is asked for without momentum.
    """
    if nesterov and momentum == 0.0:
        raise ConfigError("optimizer.nesterov=true needs momentum: set optimizer.momentum above 0, as 0.9")
    return torch.optim.SGD(
        groups(params, lr, loraplus_lr_ratio, no_decay),
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )
