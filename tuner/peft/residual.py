"""Adapters that begin with a part of the weight, which the frozen base is left without: `(W - s · B₀A₀) + s · BA`.

The base is changed when its weights have arrived and before they are quantized, so that it is the residual, the smaller
part, which is rounded to 4 bits; afterwards the weights as they were are gone.

Neither a checkpoint nor an adapter folder holds a residual. It is made again from the base: at a resume by the same
steps, which give the same bits for the same number of threads, and for a saved adapter with its B₀A₀. What is saved is
the difference to the original base, a LoRA of twice the rank, `[B, -B₀] [A; A₀]`, as PEFT makes of such adapters
(`path_initial_model_for_weight_conversion`). The other way would be to keep A₀ and B₀ in each checkpoint: a third more
than adapter and optimizer take there, to save a decomposition whose result is known.
"""

from __future__ import annotations

from typing import Self, cast

import torch
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.peft.lora import LoRA
from tuner.peft.lora_linear import Adapter, divisor_of
from tuner.peft.stored import Pair
from tuner.types import FrozenLinear, LinearSlot

Factors = tuple[Tensor, Tensor]
"""A [R, in] and B [out, R], fp32."""


class ResidualAdapter(Adapter):
    """An adapter whose layer's base lacks what it began with.

    Args:
        in_features, out_features, rank, alpha, dropout, use_rslora: as for `Adapter`.
    """

    first_A: Tensor
    first_B: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float, dropout: float, use_rslora: bool
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, dropout, use_rslora)
        self.start((self.A.detach().clone(), self.B.detach().clone()))

    def start(self, factors: Factors) -> None:
        """Begin with these matrices, which the base is left without."""
        self.A, self.B = (nn.Parameter(factor.clone()) for factor in factors)
        for name, factor in zip(("first_A", "first_B"), factors, strict=True):
            self.register_buffer(name, factor, persistent=False)

    def difference(self) -> Pair:
        """What it makes of the original base: A [2R, in], B [out, 2R], at the same scale."""
        rank = 2 * self.rank
        A, B = torch.cat([self.A, self.first_A]), torch.cat([self.B, -self.first_B], dim=1)
        return Pair(rank, self.scale * divisor_of(rank, self.use_rslora), A, B)

    @classmethod
    def of_difference(cls, pair: Pair, alpha: float, dropout: float, use_rslora: bool) -> Self:
        """The adapter of which `difference` was saved, its rank even; alpha as it was before it was multiplied."""
        A, B = cast(Tensor, pair.A), cast(Tensor, pair.B)
        rank = len(A) // 2
        adapter = cls(A.shape[1], B.shape[0], rank, alpha, dropout, use_rslora)
        adapter.start((A[rank:].clone(), -B[:, rank:]))
        adapter.A, adapter.B = nn.Parameter(A[:rank].clone()), nn.Parameter(B[:, :rank].clone())
        return adapter


class OverResidual(LoRA):
    """LoRA that begins with a part of each weight; a method says which."""

    def __init__(self, *keys: object) -> None:
        super().__init__(*keys)  # type: ignore[arg-type]
        self._factors: dict[str, Factors] = {}

    def factors(self, weight: Tensor) -> Factors:
        """What the adapter of a weight, fp32 [out, in], begins with."""
        raise NotImplementedError

    def before_packing(self, model: nn.Module, slot: LinearSlot) -> None:
        """Take from a layer that will be adapted what its adapter begins with."""
        if slot.role in self.roles:
            self._require_room(slot)
            self._factors[slot.path] = self._taken(cast(nn.Linear, slot.module))

    def adapter(self, slot: LinearSlot) -> Adapter:
        base = slot.module
        adapter = ResidualAdapter(*self.sizes(slot), self.rank, self.alpha, self.dropout, self.use_rslora)
        if next(base.parameters()).is_meta:
            return adapter
        if slot.path not in self._factors and isinstance(base, FrozenLinear):
            raise ModelError(f"peft={self.name}: {slot.path} is quantized already, and what it was is gone")
        seen = slot.path in self._factors
        adapter.start(self._factors.pop(slot.path) if seen else self._taken(cast(nn.Linear, base)))
        return adapter

    @torch.no_grad()
    def _taken(self, linear: nn.Linear) -> Factors:
        A, B = self.factors(linear.weight.float())
        factors = A.contiguous(), B.contiguous()  # as when they are read: other strides may round otherwise
        subtract(linear, factors, self.scale)
        return factors


def subtract(linear: nn.Linear, factors: Factors, scale: float) -> None:
    """`W - scale · BA` in the place of W, computed in fp32 and rounded once."""
    A, B = (factor.to(linear.weight.device) for factor in factors)
    linear.weight.data = (linear.weight.float() - scale * (B @ A)).to(linear.weight.dtype)


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis [n, k] of the columns of [n, k]."""
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis
