"""Which layers see a sliding window, in the words of `config.json`."""

from __future__ import annotations

from typing import Literal

from tuner.errors import ModelError
from tuner.models.config import ModelConfig

LayerType = Literal["full_attention", "sliding_attention"]


def window_by_type(
    config: ModelConfig, window: int | None, types: list[LayerType] | None, layer: int, *, slides: bool
) -> int | None:
    """The window of a layer, None for one that sees all before it.

    Args:
        config: of the model.
        window: of the layers that slide.
        types: of all layers, None where the family's rule holds.
        layer: counted from 0.
        slides: what that rule says of it.

    Raises:
        ModelError: a list that does not name each layer, or a kind of layer that is not known.
    """
    if types is None:
        return window if slides else None
    if len(types) != config.num_hidden_layers:
        layers = config.num_hidden_layers
        raise ModelError(f"{config.whose}layer_types names {len(types)} layers, num_hidden_layers={layers}")
    if types[layer] not in ("full_attention", "sliding_attention"):
        raise ModelError(f"{config.whose}layer_types: {types[layer]!r}; valid: full_attention, sliding_attention")
    return window if types[layer] == "sliding_attention" else None
