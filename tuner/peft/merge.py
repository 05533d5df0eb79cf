"""Adapters added into the weights they adapt: the parameters of a plain model, each made when it is asked for.

The adapted model stays as it is, so that a run may write its merged weights and train on, and no second model is held.
Sums are made in fp32 and rounded once.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tuner.peft.adapted import AdaptedLinear
from tuner.peft.token_rows import TokenRows
from tuner.types import CausalLM, FrozenLinear


def unties(model: nn.Module) -> bool:
    """Whether head and embedding, which are one matrix, are two in the plain model: where an adapter is on the head."""
    lm = cast(CausalLM, model)
    return lm.tied and isinstance(lm.lm_head, AdaptedLinear)


@torch.no_grad()
def plain_parameter(model: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """A parameter of the plain model in `dtype`, whatever is in its layer's place here.

    Args:
        model: with adapters, packed layers or rows of tokens that trained; it computes what it computed.
        name: in the plain model.
        dtype: that the model computes in.
    """
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, AdaptedLinear):
        value = module.merged_weight() if kind == "weight" else cast(Tensor, module.merged_bias())
    elif kind != "weight":
        value = cast(Tensor, getattr(module, kind))
    elif isinstance(module, TokenRows):
        value = module.current_weight()
    else:
        value = module.dense_weight() if isinstance(module, FrozenLinear) else cast(Tensor, module.weight)
    return value.detach().to(dtype)
