"""`+scale=tiny`: the model that the other choices compose, made small without becoming another kind of model.

`conf/scale/<name>.yaml` says the sizes. What a size alone does not say is worked out here from the model's own shape:
how many heads share keys and values, the lists that have an entry for each dimension or layer, where a stretched
context began. Keys that say a kind and no size (biases, ties, caps, rotary base) stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WHERE_SAID = ("head_dim", "sliding_window", "query_pre_attn_scalar")
"""Sizes of which a model may have none, and then stays without."""


def shrunk(model: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a smaller model that differ from those of `model`.

    Args:
        model: the keys of one with all of its shape.
        sizes: what `conf/scale/<name>.yaml` says of the model.
    """
    small = {key: value for key, value in sizes.items() if key not in WHERE_SAID or model.get(key) is not None}
    new = {**model, **small}
    found = {**small, "num_key_value_heads": _key_value_heads(model, new["num_attention_heads"])}
    if model.get("max_window_layers") is not None:
        found["max_window_layers"] = _in_proportion(model, new, "max_window_layers", "num_hidden_layers")
    if model.get("layer_types"):
        found["layer_types"] = _layers(model["layer_types"], new["num_hidden_layers"])
    if model.get("rope_scaling"):
        found["rope_scaling"] = _scaling(model, new)
    return {**found, **{key: sizes[key] for key in found.keys() & sizes.keys()}}


def _key_value_heads(model: Mapping[str, Any], heads: int) -> int:
    """As many as query heads, or one, where the model has so; else, grouped, half as many."""
    before = model["num_attention_heads"]
    key_value: int = model["num_key_value_heads"] or before
    if heads == before or key_value == 1:
        return key_value
    return heads if key_value == before else max(1, heads // 2)


def _layers(types: Sequence[str], number: int) -> list[str]:
    """A type for each layer: those of the model in the order in which they first appear, over and over."""
    kinds = list(dict.fromkeys(types))
    return [kinds[layer % len(kinds)] for layer in range(number)]


def _scaling(model: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The same stretch, begun at the same share of the context; a factor for each pair of a head's dimensions."""
    pairs = (new["head_dim"] or new["hidden_size"] // new["num_attention_heads"]) // 2
    scaling = dict(model["rope_scaling"])
    if "original_max_position_embeddings" in scaling:
        whole = {**scaling, "max_position_embeddings": model["max_position_embeddings"]}
        scaling["original_max_position_embeddings"] = max(
            1, _in_proportion(whole, new, "original_max_position_embeddings", "max_position_embeddings")
        )
    return {key: _thinned(value, pairs) if isinstance(value, list) else value for key, value in scaling.items()}


def _in_proportion(model: Mapping[str, Any], new: Mapping[str, Any], key: str, size: str) -> int:
    return int(model[key] * new[size] // model[size])


def _thinned(values: Sequence[Any], number: int) -> list[Any]:
    """`number` of the values at equal distances, the first among them."""
    return [values[i * len(values) // number] for i in range(number)]
