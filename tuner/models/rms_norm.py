"""Root mean square normalisation whose backward keeps the input and one number a row.

The composed form (square, mean, rsqrt, two products, two casts) keeps five tensors of the input's size for backward,
half of them in fp32. Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv:1910.07467). Rounding
follows transformers: LlamaRMSNorm normalises in fp32, rounds to the input's dtype and then multiplies by the weight;
GemmaRMSNorm multiplies by `1 + weight` in fp32 and rounds at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, zero_centered: bool, out_dtype: torch.dtype) -> Tensor:
        x_f32 = x.float()
        rstd = x_f32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        ctx.zero_centered = zero_centered
        if zero_centered:
            return (x_f32 * rstd).mul_(1.0 + weight.float()).to(out_dtype)
        return (x_f32 * rstd).to(x.dtype).mul_(weight).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        normed = x.float() * rstd
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grads[0] * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None, None, None
        grad_normed = grads[0].float() * (1.0 + weight.float() if ctx.zero_centered else weight)
        projection = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = grad_normed.addcmul_(normed, projection, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, None, None, None


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension, (..., dim) -> (..., dim).

    Args:
        dim: size of the last dimension.
        eps: added to the mean square before the root.
        zero_centered: multiply by `1 + weight`, as the Gemma families do; their weights start at zero.

    Attributes:
        out_dtype: of what comes out; None is that of what goes in.
    """

    out_dtype: torch.dtype | None = None

    def __init__(self, dim: int, eps: float, zero_centered: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if zero_centered else torch.ones(dim))
        self.eps = eps
        self.zero_centered = zero_centered

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.out_dtype or x.dtype
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps, self.zero_centered, dtype)  # type: ignore[no-untyped-call]
        return out
