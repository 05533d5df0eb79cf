"""Which family a folder belongs to, and where a configuration's weights and tokenizer are."""

from __future__ import annotations

from pathlib import Path

from tuner.errors import ModelError, nearest
from tuner.models.folder import read_config
from tuner.models.llama import LlamaConfig
from tuner.models.package import packaged_model

FAMILIES = {"llama": LlamaConfig}
"""`model_type` of a `config.json` to the class that reads it."""


def config_of_folder(folder: Path) -> LlamaConfig:
    """The configuration of a Hugging Face folder.

    Raises:
        ModelError: an architecture that is not supported, or a `config.json` that is not readable.
    """
    config = read_config(folder)
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise ModelError(f"{folder}: model_type={model_type} is not supported; {nearest(model_type, FAMILIES)}")
    return FAMILIES[model_type].from_hugging_face(config, str(folder))


def located(config: LlamaConfig) -> LlamaConfig:
    """The same model with `path` naming the folder of its weights, and the shape that folder states.

    Random weights stay without a path.

    Raises:
        ModelError: neither a path, a package nor random weights are asked for, or the folder is not usable.
    """
    if config.path is not None:
        return config_of_folder(Path(config.path).expanduser())
    if config.random_weights:
        return config
    if config.package is None:
        raise ModelError("this model's weights are on no package: give model.path=FOLDER (a Hugging Face folder)")
    return config_of_folder(packaged_model(config.package))
