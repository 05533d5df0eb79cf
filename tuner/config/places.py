"""A model in a folder or on the hub has the shape its config.json states: words about the shape are refused.

A preset's own shape, that of `model=tiny` too, is no word about it: `model.path=FOLDER` holds beside any of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from tuner.config.groups import SCALE
from tuner.config.signatures import constant_of
from tuner.errors import UnknownKey

PLACES = ("path", "source")
OF_RANDOM_WEIGHTS = ("random_weights", "random_tokenizer")


def refuse_shape_of_folder(config: DictConfig, words: Sequence[str]) -> None:
    """Refuse words that set a key of the shape, or choose a scale, of a model whose `config.json` gives the shape.

    Args:
        config: composed from `words`.
        words: the overrides.

    Raises:
        UnknownKey: naming each such word.
    """
    given = (OmegaConf.select(config, f"model.{key}", throw_on_missing=False) for key in PLACES)
    place = next((f"model.{key}={value}" for key, value in zip(PLACES, given, strict=True) if value is not None), None)
    if place is None:
        return
    kept = {*constant_of("tuner.models.config.ModelConfig", "beside_config_json"), "_target_"} - {*OF_RANDOM_WEIGHTS}
    said = [(word, word.lstrip("+~").partition("=")[0]) for word in words if "=" in word]
    ignored = [
        (word, key)
        for word, key in said
        if key == SCALE or (key.startswith("model.") and key.split(".")[1] not in kept)
    ]
    if ignored:
        raise UnknownKey(
            [
                f"{word} {place}: its config.json gives the shape and its weights are loaded, so this would be ignored"
                for word, _ in ignored
            ],
            ignored[0][1],
        )
