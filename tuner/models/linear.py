"""A linear layer that computes in the dtype of what it is given.

Under mixed precision weights are in fp32 and what comes in is not. Composed from a cast and a product, autograd would
keep the cast weight of every layer for backward: half the size of the model once more. Here it is cast again instead.
Weights of the dtype that comes in take PyTorch's own way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _LinearInDtypeOfInput(torch.autograd.Function):
    """`x Wᵀ + b` in the dtype of x; gradients of W and b in theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grads[0] @ weight.to(grads[0].dtype) if ctx.needs_input_grad[0] else None
        grad_2d = grads[0].reshape(-1, grads[0].shape[-1])
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_2d.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_2d.sum(0, dtype=weight.dtype)
        return grad_x, grad_weight, grad_bias


class Linear(nn.Linear):
    """`x Wᵀ + b` in the dtype of x, (..., in_features) -> (..., out_features)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        out: Tensor = _LinearInDtypeOfInput.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out
