"""Muon of PyTorch for matrices, with AdamW for all else (Jordan 2024, https://kellerjordan.github.io/posts/muon/; Liu
et al. 2025, Muon is Scalable for LLM Training, https://arxiv.org/abs/2502.16982).

Muon makes each step of a matrix orthogonal. That is meant for matrices which map one hidden state to another: the
linear layers of blocks. The A [R, in] and B [out, R] of an adapter are such maps too, into and out of R dimensions, and
are stepped as matrices of their own; what is made orthogonal is the step of each, not that of their product. Embedding,
output head and rows of new tokens, of which a batch moves few rows, and whatever is no matrix, are AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from tuner.errors import ConfigError
from tuner.optimizers.betas import checked
from tuner.optimizers.groups import ROLES, NoDecay, Role, Trained, groups
from tuner.types import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt

ORTHOGONAL: tuple[Role, ...] = ("matrices", "A", "B")
OTHERS = tuple(role for role in ROLES if role not in ORTHOGONAL)
"""The parts that are Muon's, and AdamW's."""


def muon(
    params: Sequence[Trained],
    lr: PositiveFloat,
    momentum: Fraction,
    nesterov: bool,
    ns_steps: PositiveInt,
    adjust_lr_fn: Literal["original", "match_rms_adamw"],
    weight_decay: NonNegativeFloat,
    adamw_lr: PositiveFloat | None,
    adamw_betas: list[float],
    adamw_eps: PositiveFloat,
    loraplus_lr_ratio: PositiveFloat | None,
    no_decay: NoDecay,
) -> Optimizer:
    """`torch.optim.Muon` and `torch.optim.AdamW` as one optimizer; of a matrix the state is one more of it.

    Args:
        momentum, nesterov: of the average that is made orthogonal.
        ns_steps: iterations that make it so.
        adjust_lr_fn: `match_rms_adamw` scales a step of [m, n] by 0.2 sqrt(max(m, n)), so that its numbers have the
            size of AdamW's and `lr` is what it would be there; `original` by sqrt(max(1, m / n)).
        weight_decay: of both.
        adamw_lr: learning rate of AdamW; null: `lr`.
        adamw_betas, adamw_eps: of AdamW.

    Raises:
        ConfigError: if nothing that trains is a matrix of a block or an adapter; that is AdamW's alone.
    """
    matrices = groups(params, lr, loraplus_lr_ratio, no_decay, of=ORTHOGONAL)
    others = groups(params, adamw_lr or lr, loraplus_lr_ratio, no_decay, of=OTHERS)
    if not matrices:
        raise ConfigError("optimizer=muon: no matrix of a linear layer or an adapter trains; say optimizer=adamw")
    parts: list[Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
    ]
    if others:
        parts.append(
            torch.optim.AdamW(
                others,
                lr=adamw_lr or lr,
                betas=checked(adamw_betas, "adamw_betas"),
                eps=adamw_eps,
                weight_decay=weight_decay,
                fused=True,
            )
        )
    return Together(parts)


class Together(Optimizer):
    """Several optimizers as one: their groups one behind the other, and one state.

    Args:
        parts: over different parameters.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = [(part, len(part.param_groups)) for part in parts]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let each part step its own groups, which a loaded state has replaced by new ones."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for part, number in self.parts:
            part.param_groups = self.param_groups[first : first + number]
            part.state = self.state
            part.step()
            first += number
        return loss
