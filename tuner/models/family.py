"""Which family a folder belongs to, and where a configuration's weights and tokenizer are."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tuner.errors import ModelError, nearest
from tuner.models.config import ModelConfig
from tuner.models.folder import read_config
from tuner.models.gemma import GemmaConfig
from tuner.models.gemma2 import Gemma2Config
from tuner.models.hub import cached_folder, snapshot
from tuner.models.llama import LlamaConfig
from tuner.models.mistral import MistralConfig
from tuner.models.package import packaged_model
from tuner.models.phi3 import Phi3Config
from tuner.models.qwen2 import Qwen2Config
from tuner.models.qwen3 import Qwen3Config

FAMILIES: dict[str, type[ModelConfig]] = {
    family.model_type: family
    for family in (LlamaConfig, MistralConfig, GemmaConfig, Gemma2Config, Phi3Config, Qwen2Config, Qwen3Config)
}
"""`model_type` of a `config.json` to the class that reads it."""


def config_of_folder(folder: Path) -> ModelConfig:
    """The configuration of a Hugging Face folder.

    Raises:
        ModelError: an architecture that is not supported, or a `config.json` that is not readable.
    """
    config = read_config(folder)
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise ModelError(f"{folder}: model_type={model_type} is not supported; {nearest(model_type, FAMILIES)}")
    return FAMILIES[model_type].from_hugging_face(config, str(folder))


def located(config: ModelConfig) -> ModelConfig:
    """The same model with `path` naming the folder of its weights, and the shape that folder states.

    `add_tokens` and `chat_template` stay; the shape is the one before they are added.

    Random weights stay without a path. With a `source` it is the folder of its snapshot, downloaded if need be, and
    `revision` is the commit.

    Raises:
        ConfigError: a `source` without the extra `hub`.
        ModelError: neither a path, a source, a package nor random weights are asked for, the folder is not usable, or
            the hub does not give it.
    """
    return replace(_located(config), add_tokens=config.add_tokens, chat_template=config.chat_template)


def _located(config: ModelConfig) -> ModelConfig:
    if config.path is not None:
        return config_of_folder(Path(config.path).expanduser())
    if config.source is not None:
        folder = snapshot(config.source, config.revision)
        return replace(config_of_folder(folder), source=config.source, revision=folder.name)
    if config.random_weights:
        return config
    if config.package is None:
        raise ModelError("this model's weights are on no package: give model.path=FOLDER or model.source=ORG/NAME")
    return config_of_folder(packaged_model(config.package))


def stated(config: ModelConfig) -> ModelConfig:
    """The same model with the family and the shape that its `config.json` states; needs no weights and asks no hub.

    Raises:
        ModelError: the folder is not usable, or the snapshot of a `source` is not in the cache.
    """
    if config.path is None and config.source is None:
        return config
    if config.path is not None:
        folder = Path(config.path).expanduser()
    elif (found := cached_folder(str(config.source), config.revision)) is not None:
        folder = found
    else:
        raise ModelError(
            f"model.source={config.source} is not in the cache, so its shape is not known; "
            f"tuner download {config.source} fetches it"
        )
    beside = {key: getattr(config, key) for key in ("path", "source", "revision", "add_tokens", "chat_template")}
    return replace(config_of_folder(folder), **beside)


def as_node(config: ModelConfig) -> dict[str, Any]:
    """The node of a run's configuration that builds this model."""
    return {"_target_": f"{type(config).__module__}.{type(config).__name__}", **asdict(config)}
