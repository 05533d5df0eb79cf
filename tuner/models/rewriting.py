"""A Hugging Face folder written anew: whatever its weights are in, sharded safetensors come out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tuner.models.config import ModelConfig
from tuner.models.family import config_of_folder
from tuner.models.folder import read_config, read_tensors, require_weights, weight_files
from tuner.models.stored import shapes_of
from tuner.models.writing import cast, write_weights


def rewrite(source: Path, folder: Path, dtype: torch.dtype | None) -> ModelConfig:
    """Write config and weights of a Hugging Face folder; a head that is the embedding matrix is written once.

    Args:
        source: with safetensors or `.bin` files.
        folder: made if it is not there.
        dtype: of the weights; None keeps each as it is.

    Returns:
        The configuration that was written.

    Raises:
        ModelError: a folder that is damaged, or that `config_of_folder` refuses.
    """
    config = config_of_folder(source)
    wanted = shapes_of(config)
    require_weights(source, wanted, tied=config.tie_word_embeddings)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read_tensors(source):
            if name in wanted:
                yield name, cast(name, tensor, dtype or tensor.dtype)

    elements = sum(torch.Size(shape).numel() for shape in wanted.values())
    needed_bytes = dtype.itemsize * elements if dtype else sum(file.stat().st_size for file in weight_files(source))
    original = {key: value for key, value in read_config(source).items() if key not in ("dtype", "torch_dtype")}
    write_weights(folder, {**original, **config.to_hugging_face()}, needed_bytes, tensors())
    return config
