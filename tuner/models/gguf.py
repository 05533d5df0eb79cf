"""From a GGUF file to a Hugging Face folder, through the `gguf` library's own tables of names and its dequantizer.

What llama.cpp's converter did to the weights is undone: of the llama architecture the rows of q and k are stored so
that rotary pairs are neighbours, where Hugging Face keeps the two halves of a head apart; and Gemma's norms, whose
weights are centred on zero, are stored with 1 added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.errors import ModelError
from tuner.models.config import ModelConfig
from tuner.models.fit import require_fit
from tuner.models.gguf_config import config_of
from tuner.models.gguf_tokenizer import write_tokenizer
from tuner.models.stored import shapes_of
from tuner.models.writing import cast, write_weights

CONVERTER_VERSION = 1
"""Of what `convert` writes; a higher number leaves the folders in people's caches unused and makes new ones."""

PERMUTED = ("llama",)
"""Architectures whose q and k llama.cpp's converter reorders."""

OF_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that hold a number for each rotary frequency; what they say is in `config.json`."""

SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file whose keys and tensors have been found.

    Attributes:
        path: of the file.
        meta: value of each key.
        tensors: `gguf.ReaderTensor` by name; their data is mapped, not read.
    """

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """In PyTorch's order of dimensions."""
        return {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self.tensors.items()}

    def weight(self, name: str) -> Tensor:
        """One tensor, dequantized to fp32.

        Raises:
            ModelError: a type that the `gguf` library does not dequantize.
        """
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        try:
            return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        except NotImplementedError as error:
            raise ModelError(f"{name} is {tensor.tensor_type.name}: {error}") from error


def convert(gguf_file: Path, folder: Path, dtype: torch.dtype = torch.float32) -> ModelConfig:
    """Write the Hugging Face folder of a GGUF file: weights, config, tokenizer and chat template.

    Args:
        gguf_file: of an architecture in `gguf_config.ARCHITECTURES`, in any type that the `gguf` library dequantizes.
        folder: made if it is not there; the caller renames it into place when it is whole.
        dtype: of the weights; fp32 holds every type of a GGUF file exactly.

    Returns:
        The configuration that was written.

    Raises:
        ModelError: another architecture or tokenizer, a damaged file, or no `gguf` library.
    """
    file = read_gguf(gguf_file)
    try:
        config, names = _described(file)
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer(folder, file.meta)
        ids = {name: file.meta.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
        written = {**config.to_hugging_face(), **{name: id_ for name, id_ in ids.items() if id_ is not None}}
        needed_bytes = dtype.itemsize * sum(math.prod(file.shapes[stored]) for stored in names)
        write_weights(folder, written, needed_bytes, _weights(file, names, config, dtype))
    except ModelError as error:
        raise ModelError(f"{gguf_file}: {error}") from error
    return config


def _described(file: GGUFFile) -> tuple[ModelConfig, dict[str, str]]:
    """The configuration, and the name in the folder of each tensor, which are exactly those that the model needs."""
    rope = {name: file.weight(name) for name in OF_ROPE if name in file.tensors}
    config = config_of(file.meta, file.shapes, rope)
    wanted = shapes_of(config)
    names = stored_names(file.meta["general.architecture"], config, wanted)
    found = {names.get(name, name): shape for name, shape in file.shapes.items() if name not in OF_ROPE}
    require_fit("the tensors are not those that the keys describe", wanted, found)
    return config, names


def read_gguf(path: Path) -> GGUFFile:
    """Find the keys and tensors of a file.

    Raises:
        ModelError: no `gguf` library, a file that is damaged or truncated, or one part of several.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError("reading a GGUF file needs the gguf library: pip install gguf") from error
    try:
        reader = GGUFReader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        said = " ".join(str(error).split())
        raise ModelError(f"{path}: damaged or truncated, or no GGUF file: {said}") from error
    if (parts := meta.get("split.count", 1)) > 1:
        raise ModelError(f"{path}: one of {parts} parts; join them first with llama.cpp's gguf-split --merge")
    return GGUFFile(path, meta, {tensor.name: tensor for tensor in reader.tensors})


def stored_names(architecture: str, config: ModelConfig, wanted: Mapping[str, Any]) -> dict[str, str]:
    """Name of each tensor in a GGUF file to its name in a Hugging Face folder, by the `gguf` library's tables."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (number,) = [key for key, name in MODEL_ARCH_NAMES.items() if name == architecture]
    table = get_tensor_name_map(number, config.num_hidden_layers)
    parts = {name: name.rpartition(".") for name in wanted}
    return {f"{table.get_name(path)}.{kind}": name for name, (path, _, kind) in parts.items()}


def _weights(
    file: GGUFFile, names: Mapping[str, str], config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor as the folder holds it, made when it is asked for."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    permuted = file.meta["general.architecture"] in PERMUTED
    for stored in file.tensors:
        if stored in OF_ROPE:
            continue
        weight, name = file.weight(stored), names[stored]
        part = name.split(".")[-2]
        if permuted and part in heads:
            weight = unpermute(weight, heads[part])
        if config.zero_centered_norms and name.endswith("norm.weight"):
            weight = weight - 1
        yield name, cast(name, weight, dtype)


def unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Keep the halves of each head apart whose rotary pairs lie side by side: rows (2i, 2i+1) become (i, i + E/2).

    This is the order in GGUF files of the llama architecture and in Meta's own checkpoints.

    Args:
        weight: of q or k, [heads * E, D], or a bias [heads * E].
        num_heads: heads in it.
    """
    pairs = weight.view(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
