"""A frozen linear layer whose weight is packed, whatever to: it is made dense for each product, and again in backward.

No matrix product works on packed weights here, and none on quantized activations, on any device. The kernels that do
help where a product is small, as for single tokens; in training the dense weight is made once per product anyway, and
gradients do not go through rounded activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tuner.errors import ModelError
from tuner.keeping import product
from tuner.types import FrozenLinear, LinearSlot, Quantization

PIECE_WEIGHTS = 2**20
"""Weights quantized at once, a multiple of every block size. bitsandbytes' operators for CPUs make temporaries of 12 to
16 bytes a weight: 700 MiB for a matrix of 4096 x 11008, and 16 MiB for a piece of it."""


class Quantizable(Protocol):
    """A model that says which of its linear layers may be quantized: those inside the transformer blocks."""

    def quantizable(self) -> Iterator[LinearSlot]: ...


def quantize_blocks(model: nn.Module, quantization: Quantization) -> None:
    """Replace the linear layers inside the transformer blocks, one by one: at no time do two forms of more than one
    layer exist.

    Raises:
        ModelError: if the model offers no layer to quantize.
    """
    slots = list(cast(Quantizable, model).quantizable())
    if not slots:
        raise ModelError(f"quantization={quantization.name}: {type(model).__name__} has no linear layer to quantize")
    for slot in slots:
        slot.replace(quantization.packed(cast(nn.Linear, slot.module)))


class PackedLinear(nn.Module):
    """`y = x Wᵀ + b` with a frozen W, (..., in_features) -> (..., out_features); the gradient reaches x, never W.

    Args:
        in_features, out_features: of W.
        compute_dtype: of the dense weight; at first what the quantized weight was, and `.to(dtype)` changes it.
        parts: the packed weight, the statistics that it is made dense with, the bias, or None where there is none; all
            frozen and, so that sharding, safetensors and the meta device need no special case, flat.
    """

    statistics: ClassVar[tuple[str, ...]]
    """Parts that keep their dtype whatever the model is cast to, or the levels would move."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, compute_dtype: torch.dtype, **parts: Tensor | None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        for name in ("weight", *self.statistics, "bias"):
            part = parts[name]
            self.register_parameter(name, None if part is None else nn.Parameter(part, requires_grad=False))
        self.settled()

    def settled(self) -> None:
        """Called when the parts are on another device than before; what a kind keeps for each device."""

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features] in the compute dtype, made anew at each call."""
        raise NotImplementedError

    def compute_in(self, dtype: torch.dtype) -> None:
        """Make the weight dense in `dtype` from now on; the bias is cast, what is packed stays as it is."""
        self.compute_dtype = dtype
        if self.bias is not None:
            self.bias.data = self.bias.data.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _LinearWithFrozenWeight.apply(x, self))  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to(dtype)` means the compute dtype."""
        # `.data`, because the parameter itself may be changed in place.
        before = {name: getattr(self, name).data for name in self.statistics if getattr(self, name) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, statistic in before.items():
            moved = getattr(self, name)
            if moved.dtype != statistic.dtype:
                setattr(self, name, nn.Parameter(statistic.to(moved.device), requires_grad=False))
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        self.settled()
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _LinearWithFrozenWeight(torch.autograd.Function):
    """Makes the dense weight again for the backward pass, where `F.linear` would keep it alive until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return product(lambda: F.linear(x, layer.dense_weight(), layer.bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dense_weight(), None


def quantization_error(dense: Tensor, linear: FrozenLinear) -> dict[str, float]:
    """How far the quantized weight is from the `dense` one [out_features, in_features] it was made of.

    Returns:
        `relative_error`: Frobenius norm of the difference over that of `dense`; `max_abs_error`: the largest one.
    """
    dense = dense.detach().float()
    difference = linear.dense_weight().float() - dense
    return {
        "relative_error": float(difference.norm() / dense.norm()),
        "max_abs_error": float(difference.abs().max()),
    }
