"""What the layers of all methods share: a frozen linear layer and what is put around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.types import CausalLM, FrozenLinear


def dense_weight(base: nn.Module) -> Tensor:
    """The weight [out, in] of a plain or a packed linear layer."""
    if isinstance(base, nn.Linear):
        return base.weight
    if isinstance(base, FrozenLinear):
        return base.dense_weight()
    raise ModelError(f"LoRA cannot wrap a {type(base).__name__}: it has no weight matrix")


class AdapterPart(nn.Module):
    """Parameters that an adapter adds to a model: none of the model's own, and held in `precision.trainable`."""


class AdaptedLinear(nn.Module):
    """A layer in the place of a frozen linear one, (..., in) -> (..., out).

    Args:
        base: the frozen layer, plain or packed.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def in_features(self) -> int:
        return self.base.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.base.out_features  # type: ignore[return-value]

    def merged_weight(self) -> Tensor:
        """The weight of the plain layer that computes the same, fp32 [out, in]."""
        return dense_weight(self.base).float()

    def merged_bias(self) -> Tensor | None:
        """The bias of that layer."""
        return self.base.bias  # type: ignore[return-value]


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Checkpoint name and layer of every linear layer that a method has changed."""
    for slot in cast(CausalLM, model).linears():
        if isinstance(slot.module, AdaptedLinear):
            yield slot.path, slot.module
