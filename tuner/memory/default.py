"""Techniques that trade speed for memory, applied to a model that is otherwise complete."""

from __future__ import annotations

from functools import wraps
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from tuner.errors import ModelError


class MemoryTechniques:
    """The keys of the `memory` group.

    Args:
        activation_checkpointing: `full` keeps the input of each layer and computes the layer again in backward
            (Chen et al., arXiv:1604.06174): activations of one layer at a time for about a third more compute. True
            and False are taken as `full` and `none`.
    """

    def __init__(self, activation_checkpointing: bool | Literal["none", "full"]) -> None:
        if isinstance(activation_checkpointing, bool):
            activation_checkpointing = "full" if activation_checkpointing else "none"
        self.activation_checkpointing = activation_checkpointing

    def apply(self, model: nn.Module) -> None:
        """Change `model`, whose `layers` are its transformer blocks, in place; parameters keep their names.

        Raises:
            ModelError: a model without `layers`.
        """
        if self.activation_checkpointing == "none":
            return
        layers = getattr(model, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise ModelError(f"memory.activation_checkpointing=full: {type(model).__name__} has no list of layers")
        for layer in layers:
            _checkpoint(layer)


def _checkpoint(layer: nn.Module) -> None:
    """Compute `layer` again in backward, while it is training.

    Its forward is replaced and not wrapped in a module of its own, which would rename every parameter.
    """
    forward = layer.forward

    @wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    layer.forward = recomputed
