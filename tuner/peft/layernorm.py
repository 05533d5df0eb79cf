"""Norms and biases alone train: the fewest weights a model has of its own (LN tuning, Zhao et al., arXiv:2312.11420;
biases: BitFit, Zaken et al., arXiv:2106.10199)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast

from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.peft.adapted import AdaptedLinear, AdapterPart, adapted_layers
from tuner.types import CausalLM, FrozenLinear

NOTE = "tuned_norms"
"""The attribute of a model that names the norms whose weights are an adapter's."""


class LayerNorm:
    """Freeze the model but for the weights of its norms and, where it has any, the biases of its linear layers.

    Args:
        name: `layernorm`.
        train_biases: biases train too; a family without biases has norms alone.
    """

    def __init__(self, name: Literal["layernorm"], train_biases: bool) -> None:
        self.name = name
        self.train_biases = train_biases

    def adapt(self, model: nn.Module) -> None:
        """Make them train, in place; afterwards nothing else has `requires_grad`.

        Raises:
            ModelError: the model has tokens to learn.
        """
        lm = cast(CausalLM, model)
        if lm.new_tokens:
            raise ModelError("peft=layernorm: an adapter of this kind has no place for the rows of model.add_tokens")
        model.requires_grad_(False)
        names = tuple(path for path, _ in norms(model))
        tune(model, names)
        for path in names:
            model.get_parameter(f"{path}.weight").requires_grad_(True)
        for slot in lm.linears() if self.train_biases else ():
            if isinstance(bias := slot.module.bias, Tensor):
                slot.replace(BiasLinear(slot.module, Bias(bias.detach().clone())).train(model.training))


class Bias(AdapterPart):
    """A bias that trains, [out]."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)


class BiasLinear(AdaptedLinear):
    """`base(x)` with another bias, of which the difference is added: the dtype it trains in may be a wider one.

    Args:
        base: the frozen layer, plain or packed, which has a bias.
        bias: [out].
    """

    def __init__(self, base: nn.Module, bias: Bias) -> None:
        super().__init__(base)
        self.bias_part = bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out + (self.bias_part.bias - cast(Tensor, self.base.bias)).to(out.dtype)

    def merged_bias(self) -> Tensor | None:
        return self.bias_part.bias


def norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of everything whose weight is a vector: of packed linear layers it stands for a matrix."""
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1 and not isinstance(module, FrozenLinear):
            yield path, module


def tune(model: nn.Module, paths: tuple[str, ...]) -> None:
    """Note which norms are an adapter's."""
    setattr(model, NOTE, paths)


def tuned_norms(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name of the norm and weight of those that are an adapter's."""
    for path in getattr(model, NOTE, ()):
        yield path, model.get_parameter(f"{path}.weight")


def tuned_biases(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name of the layer and bias of those that are an adapter's."""
    for path, layer in adapted_layers(model):
        if isinstance(layer, BiasLinear):
            yield path, layer.bias_part.bias
