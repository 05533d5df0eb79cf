"""The last blocks train in full and all before them stays: no backward pass goes further than the first of them."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import nn

from tuner.errors import ModelError
from tuner.peft.saved_modules import EMBEDDING
from tuner.peft.token_rows import train_new_tokens
from tuner.types import CausalLM, PositiveInt


class LastLayers:
    """Freeze all but the end of a model. What it leaves is a whole model, as full training does.

    Args:
        name: `last_layers`.
        num_layers: transformer blocks that train, counted from the last.
        train_final_norm: the norm behind the last block trains too.
        train_output: the output head trains too; where it is the embedding matrix, that trains in both of its roles.
    """

    def __init__(
        self, name: Literal["last_layers"], num_layers: PositiveInt, train_final_norm: bool, train_output: bool
    ) -> None:
        self.name = name
        self.num_layers = num_layers
        self.train_final_norm, self.train_output = train_final_norm, train_output

    def adapt(self, model: nn.Module) -> None:
        """Afterwards exactly the parameters of these modules, and rows of new tokens, have `requires_grad`.

        Raises:
            ModelError: more blocks than there are, or quantized ones.
        """
        lm = cast(Any, model)
        layers = lm.model.layers
        if self.num_layers > len(layers):
            raise ModelError(f"peft.num_layers={self.num_layers}: the model has {len(layers)} blocks")
        model.requires_grad_(False)
        trained = list(layers[len(layers) - self.num_layers :])
        trained += [lm.model.norm] * self.train_final_norm + [lm.lm_head] * self.train_output
        for module in trained:
            _require_dense(module)
            module.requires_grad_(True)
        if not self.train_output:
            train_new_tokens(model)
        elif not cast(CausalLM, model).tied:
            train_new_tokens(model, matrices=(EMBEDDING,))


def _require_dense(module: nn.Module) -> None:
    whole = {name: parameter for name, parameter in module.named_parameters() if not parameter.is_floating_point()}
    if whole:
        raise ModelError(f"peft=last_layers: {next(iter(whole))} is quantized, and packed weights do not train")
