"""The linear layer that LoRA puts in place of a frozen one.

One autograd function computes base and adapter together and keeps only the input and its rank-R projection for
backward; composed from modules, autograd would also keep the adapter's output and the cast input. A frozen base
that stores its weight in another form (`FrozenLinear`) is made dense again in backward rather than kept.

The adapter's products have one side of only R. With that side as rows, CPU kernels are up to six times as fast as with
it as columns: hence the transposed forms below.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.types import FrozenLinear


def dense_weight(base: nn.Module) -> Tensor:
    """The weight [out, in] of a plain or a packed linear layer."""
    if isinstance(base, nn.Linear):
        return base.weight
    if isinstance(base, FrozenLinear):
        return base.dense_weight()
    raise ModelError(f"LoRA cannot wrap a {type(base).__name__}: it has no weight matrix")


class _LoRAFunction(torch.autograd.Function):
    """`x Wᵀ + b + scale (x_a Aᵀ) Bᵀ`; `x_a` is the dropped-out input, None where it is `x` itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_a: Tensor | None, A: Tensor, B: Tensor, base: nn.Module, scale: float) -> Tensor:
        x_2d = x.reshape(-1, x.shape[-1])
        a_input = x_2d if x_a is None else x_a.reshape(-1, x.shape[-1])
        projected = (A.to(x.dtype) @ a_input.t()).t()
        out = F.linear(x_2d, dense_weight(base), base.bias)  # type: ignore[arg-type]
        out.addmm_(projected, B.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(a_input, projected, A, B)
        ctx.base, ctx.scale, ctx.shared = base, scale, x_a is None
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a_input, projected, A, B = ctx.saved_tensors
        grad_out = grads[0].reshape(-1, grads[0].shape[-1])
        grad_projected = (B.to(grad_out.dtype).t() @ grad_out.t()).mul_(ctx.scale).t()
        grad_A = (grad_projected.t() @ a_input).to(A.dtype)
        grad_B = (projected.t() @ grad_out).mul_(ctx.scale).t().to(B.dtype, memory_format=torch.contiguous_format)
        grad_x = grad_x_a = None
        shape = (*grads[0].shape[:-1], A.shape[1])
        if ctx.needs_input_grad[0]:
            grad_x = grad_out @ dense_weight(ctx.base)
            if ctx.shared:
                grad_x.addmm_(grad_projected, A.to(grad_out.dtype))
            grad_x = grad_x.view(shape)
        if not ctx.shared and ctx.needs_input_grad[1]:
            grad_x_a = (grad_projected @ A.to(grad_out.dtype)).view(shape)
        return grad_x, grad_x_a, grad_A, grad_B, None, None


class Adapter(nn.Module):
    """The two matrices of one adapter: A [R, in] random, B [out, R] zero, so that it starts as the identity.

    Args:
        in_features, out_features: of the layer it adapts.
        rank: R.
        alpha: numerator of the scale.
        dropout: probability of dropping an input feature of A.
        use_rslora: scale by alpha / sqrt(R) (arXiv:2312.03732) and not alpha / R.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, dropout: float, use_rslora: bool
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.rank, self.alpha, self.dropout, self.use_rslora = rank, alpha, dropout, use_rslora
        self.scale = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, fp32 [out, in]: `scale · B A`."""
        return self.scale * (self.B.float() @ self.A.float())


class LoRALinear(nn.Module):
    """`base(x) + scale · (dropout(x) Aᵀ) Bᵀ` for each of its adapters, (..., in) -> (..., out).

    Source: Hu et al., LoRA (arXiv:2106.09685).

    Args:
        base: the frozen layer, plain or packed.
        adapters: by name; a run trains the one called `default`.
    """

    def __init__(self, base: nn.Module, adapters: dict[str, Adapter]) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict(adapters)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.adapters.values()
        out = self._with_base(x, first)  # type: ignore[arg-type]
        for adapter in others:
            dropped = F.dropout(x, adapter.dropout, self.training)  # type: ignore[arg-type]
            out = out + adapter.scale * F.linear(F.linear(dropped, adapter.A.to(x.dtype)), adapter.B.to(x.dtype))  # type: ignore[operator, arg-type]
        return out

    def _with_base(self, x: Tensor, adapter: Adapter) -> Tensor:
        dropped = F.dropout(x, adapter.dropout) if self.training and adapter.dropout > 0 else None
        out: Tensor = _LoRAFunction.apply(x, dropped, adapter.A, adapter.B, self.base, adapter.scale)  # type: ignore[no-untyped-call]
        return out
