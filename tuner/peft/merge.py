"""Adapters added into the weights they adapt, so that what is left is a plain model."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.peft.lora_linear import Adapter, LoRALinear, dense_weight
from tuner.types import CausalLM, FrozenLinear


def merged_weight(layer: LoRALinear) -> Tensor:
    """`W + Σ scale · B A` in fp32, [out, in]."""
    weight = dense_weight(layer.base).float()
    for adapter in layer.adapters.values():
        weight = weight + cast(Adapter, adapter).delta()
    return weight


@torch.no_grad()
def merge_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace adapted and packed layers by plain linear ones in `dtype`, in place.

    Sums are made in fp32 and rounded once.

    Raises:
        ModelError: an adapted head that is also the embedding: the sum would be no plain tied model.
    """
    lm = cast(CausalLM, model)
    if lm.tied and isinstance(lm.lm_head, LoRALinear):
        raise ModelError("this adapter changes lm_head, which is also the embedding matrix: merging would untie them")
    for slot in lm.linears():
        layer = slot.module
        if isinstance(layer, LoRALinear):
            slot.replace(_linear(merged_weight(layer), layer.base.bias, dtype))
        elif isinstance(layer, FrozenLinear):
            slot.replace(_linear(layer.dense_weight(), layer.bias, dtype))


def _linear(weight: Tensor, bias: Tensor | nn.Module | None, dtype: torch.dtype) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if isinstance(bias, Tensor):
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear
