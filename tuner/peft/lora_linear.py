"""The linear layer that LoRA puts in place of a frozen one.

One autograd function computes base and adapter together and keeps only the input and its rank-R projection for
backward; composed from modules, autograd would also keep the adapter's output and the cast input. A frozen base
that stores its weight in another form (`FrozenLinear`) is made dense again in backward rather than kept. All is
computed in the dtype of the input, to which weights of another one are cast each time.

The adapter's products have one side of only R. With that side as rows, CPU kernels are up to six times as fast as with
it as columns: hence the transposed forms below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.keeping import product
from tuner.peft.adapted import AdaptedLinear, AdapterPart, dense_weight


class Products:
    """The matrix products of `u = x Wᵀ + b + scale (x_a Aᵀ) Bᵀ` and of its gradients, which every kind of adapter
    shares; x [N, in], u [N, out]."""

    @staticmethod
    def forward(
        x: Tensor,
        a_input: Tensor,
        A: Tensor,
        B: Tensor,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """u and the projection `x_a Aᵀ` [N, R]; `weight` is asked for where u is not kept from an earlier pass."""
        projected = (A.to(x.dtype) @ a_input.t()).t()

        def u() -> Tensor:
            out = F.linear(x, weight().to(x.dtype), None if bias is None else bias.to(x.dtype))
            return out.addmm_(projected, B.to(x.dtype).t(), alpha=scale)

        return product(u), projected

    @staticmethod
    def backward(
        grad: Tensor, a_input: Tensor, projected: Tensor, A: Tensor, B: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of A, of B and of the projection, from that of u [N, out]."""
        grad_projected = (B.to(grad.dtype).t() @ grad.t()).mul_(scale).t()
        grad_A = (grad_projected.t() @ a_input).to(A.dtype)
        grad_B = (projected.t() @ grad).mul_(scale).t().to(B.dtype, memory_format=torch.contiguous_format)
        return grad_A, grad_B, grad_projected

    @staticmethod
    def backward_to_inputs(
        ctx: Any, grad: Tensor, grad_projected: Tensor, A: Tensor, shape: tuple[int, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and of x_a, as far as they are wanted; `ctx` knows the base and whether the two are one."""
        grad_x = grad_x_a = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dense_weight(ctx.base).to(grad.dtype)
            if ctx.shared:
                grad_x.addmm_(grad_projected, A.to(grad.dtype))
            grad_x = grad_x.view(shape)
        if not ctx.shared and ctx.needs_input_grad[1]:
            grad_x_a = (grad_projected @ A.to(grad.dtype)).view(shape)
        return grad_x, grad_x_a


class _LoRAFunction(torch.autograd.Function):
    """`x Wᵀ + b + scale (x_a Aᵀ) Bᵀ`; `x_a` is the dropped-out input, None where it is `x` itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_a: Tensor | None, A: Tensor, B: Tensor, base: nn.Module, scale: float) -> Tensor:
        x_2d = x.reshape(-1, x.shape[-1])
        a_input = x_2d if x_a is None else x_a.reshape(-1, x.shape[-1])
        bias: Tensor | None = getattr(base, "bias", None)
        out, projected = Products.forward(x_2d, a_input, A, B, lambda: dense_weight(base), bias, scale)
        ctx.save_for_backward(a_input, projected, A, B)
        ctx.base, ctx.scale, ctx.shared = base, scale, x_a is None
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a_input, projected, A, B = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_A, grad_B, grad_projected = Products.backward(grad, a_input, projected, A, B, ctx.scale)
        shape = (*grads[0].shape[:-1], A.shape[1])
        return *Products.backward_to_inputs(ctx, grad, grad_projected, A, shape), grad_A, grad_B, None, None


def scale_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """What `B A` is multiplied by."""
    return alpha / divisor_of(rank, use_rslora)


def divisor_of(rank: int, use_rslora: bool) -> float:
    """What alpha is divided by."""
    return math.sqrt(rank) if use_rslora else float(rank)


class Adapter(AdapterPart):
    """The two matrices of one adapter: A [R, in] random, B [out, R] zero, so that it starts as the identity.

    Args:
        in_features, out_features: of the layer it adapts.
        rank: R.
        alpha: numerator of the scale.
        dropout: probability of dropping an input feature of A.
        use_rslora: scale by alpha / sqrt(R) (arXiv:2312.03732) and not alpha / R.
    """

    adds = True
    """What it makes of a layer's output is added to it, so that several adapters can be."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, dropout: float, use_rslora: bool
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.rank, self.alpha, self.dropout, self.use_rslora = rank, alpha, dropout, use_rslora
        self.scale = scale_of(rank, alpha, use_rslora)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def begin(self, base: nn.Module) -> None:
        """Learn what there is to know of the layer that is adapted; of its weight, nothing here."""

    def forward(self, x: Tensor, base: nn.Module) -> Tensor:
        """`base(x)` with this adapter, (..., in) -> (..., out)."""
        out: Tensor = _LoRAFunction.apply(x, self.dropped(x), self.A, self.B, base, self.scale)  # type: ignore[no-untyped-call]
        return out

    def dropped(self, x: Tensor) -> Tensor | None:
        """The input of A while features of it are dropped, None where it is `x` itself."""
        return F.dropout(x, self.dropout) if self.training and self.dropout > 0 else None

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, fp32 [out, in]: `scale · B A`."""
        return (self.B.float() @ self.A.float()).mul_(self.scale)

    def adapted(self, weight: Tensor) -> Tensor:
        """The weight [out, in] with this adapter in it, fp32, of its own memory."""
        return self.delta().add_(weight)


class LoRALinear(AdaptedLinear):
    """`base(x) + scale · (dropout(x) Aᵀ) Bᵀ` for each of its adapters, (..., in) -> (..., out).

    Source: Hu et al., LoRA (arXiv:2106.09685).

    Args:
        base: the frozen layer, plain or packed.
        adapters: by name; a run trains the one called `default`.

    Raises:
        ModelError: several, of which one does more than add to the layer's output.
    """

    def __init__(self, base: nn.Module, adapters: dict[str, Adapter]) -> None:
        super().__init__(base)
        if len(adapters) > 1 and not all(adapter.adds for adapter in adapters.values()):
            raise ModelError("an adapter that scales the weight it adapts, as DoRA does, is the only one of its layer")
        self.adapters = nn.ModuleDict(adapters)

    def begin(self) -> Self:
        """Tell the adapters which layer they adapt."""
        for adapter in self.adapters.values():
            adapter.begin(self.base)  # type: ignore[operator]
        return self

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.adapters.values()
        out: Tensor = first(x, self.base)
        for adapter in others:
            dropped = F.dropout(x, adapter.dropout, self.training)  # type: ignore[arg-type]
            out = out + adapter.scale * F.linear(F.linear(dropped, adapter.A.to(x.dtype)), adapter.B.to(x.dtype))  # type: ignore[operator, arg-type]
        return out

    def merged_weight(self) -> Tensor:
        """The weight with the adapters in it, `W + Σ scale · B A`, fp32 [out, in], of its own memory."""
        weight = dense_weight(self.base)
        for adapter in self.adapters.values():
            weight = adapter.adapted(weight)  # type: ignore[operator]
        return weight
