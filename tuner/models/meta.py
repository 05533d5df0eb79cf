"""Meta's own checkpoints of Llama 2 and 3: `params.json`, and `consolidated.NN.pth`, one file a model-parallel rank.

A rank holds a slice of each matrix: of its rows where the outputs are divided, of its columns where the inputs are
(`llama/model.py` of Meta's `llama` repository: ColumnParallelLinear, RowParallelLinear, ParallelEmbedding). Norms are
whole in each. Rotary pairs are neighbours there, so the rows of q and k are put in Hugging Face's order.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.errors import ModelError
from tuner.models.fit import require_fit
from tuner.models.gguf import unpermute
from tuner.models.llama import LlamaConfig
from tuner.models.meta_config import TOKENIZER, config_of, read_params, special_ids
from tuner.models.stored import shapes_of
from tuner.models.torch_files import load_tensors
from tuner.models.writing import cast, write_weights

ROWS, COLUMNS, WHOLE = 0, 1, None
NAMES: dict[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", ROWS),
    "attention.wk": ("self_attn.k_proj", ROWS),
    "attention.wv": ("self_attn.v_proj", ROWS),
    "attention.wo": ("self_attn.o_proj", COLUMNS),
    "feed_forward.w1": ("mlp.gate_proj", ROWS),
    "feed_forward.w2": ("mlp.down_proj", COLUMNS),
    "feed_forward.w3": ("mlp.up_proj", ROWS),
    "attention_norm": ("input_layernorm", WHOLE),
    "ffn_norm": ("post_attention_layernorm", WHOLE),
    "norm": ("model.norm", WHOLE),
    "output": ("lm_head", ROWS),
    "tok_embeddings": ("model.embed_tokens", ROWS),  # from Llama 3 on; by columns before
}
"""Meta's name of a tensor, without its layer, to Hugging Face's, and the dimension that the ranks divide."""

OUTPUTS = "layers.0.attention.wo.weight"
"""Of shape [D, D / ranks] in each file."""

NOT_WEIGHTS = "rope.freqs"
"""A buffer of some checkpoints, which follows from `params.json`."""


@dataclass(frozen=True)
class Ranks:
    """The tensors of all model-parallel ranks, mapped and not read.

    Attributes:
        files: tensors by name, a mapping a rank.
        dim: D, by which the division of the embedding is known.
    """

    files: Sequence[Mapping[str, Tensor]]
    dim: int

    @property
    def names(self) -> list[str]:
        return [name for name in self.files[0] if name != NOT_WEIGHTS]

    def divided(self, name: str) -> int | None:
        """The dimension in which the ranks' slices of a tensor are joined, None where each holds the whole."""
        if name == "tok_embeddings.weight" and self.files[0][name].shape[1] != self.dim:
            return COLUMNS
        return _named(name)[1]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        shape, divided = list(self.files[0][name].shape), self.divided(name)
        if divided is not None:
            shape[divided] = sum(file[name].shape[divided] for file in self.files)
        return tuple(shape)

    def whole(self, name: str) -> Tensor:
        """The tensor, joined."""
        divided = self.divided(name)
        if divided is None or len(self.files) == 1:
            return self.files[0][name]
        return torch.cat([file[name] for file in self.files], dim=divided)


def convert_meta(source: Path, folder: Path, dtype: torch.dtype | None) -> LlamaConfig:
    """Write the Hugging Face folder of Meta's checkpoint: weights, config, and the tokenizer's file as it is.

    The tokenizer is a sentencepiece model with Llama 2 and a list of tokens for tiktoken with Llama 3; no
    `tokenizer.json` is made of it.

    Args:
        source: holds `params.json`, `consolidated.NN.pth` and, there or one folder up, `tokenizer.model`.
        folder: made if it is not there.
        dtype: of the weights; None is that of the checkpoint.

    Returns:
        The configuration that was written.

    Raises:
        ModelError: a missing or damaged file, a pickle that holds more than tensors, or a model that is none of these.
    """
    params = read_params(source)
    tokenizer = _tokenizer(source)
    ids = special_ids(tokenizer)
    ranks = Ranks(_ranks(source, params["dim"]), params["dim"])
    try:
        config, names = _described(ranks, params)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
    width = (dtype or ranks.files[0]["tok_embeddings.weight"].dtype).itemsize
    needed_bytes = width * sum(math.prod(ranks.shape(stored)) for stored in names)
    write_weights(folder, {**config.to_hugging_face(), **ids}, needed_bytes, _weights(ranks, names, config, dtype))
    shutil.copyfile(tokenizer, folder / TOKENIZER)
    return config


def _described(ranks: Ranks, params: Mapping[str, Any]) -> tuple[LlamaConfig, dict[str, str]]:
    """The configuration, and the name in the folder of each tensor, which are exactly those that the model needs."""
    names = {name: hugging_face_name(name) for name in ranks.names}
    config = config_of(params, {names[name]: ranks.shape(name) for name in names}, tied=_tied(ranks))
    if config.tie_word_embeddings:
        names.pop("output.weight", None)
    found = {name: ranks.shape(stored) for stored, name in names.items()}
    require_fit(f"tensors of {len(ranks.files)} files do not fit params.json", shapes_of(config), found)
    return config, names


def _weights(
    ranks: Ranks, names: Mapping[str, str], config: LlamaConfig, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor as the folder holds it, made when it is asked for."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for stored, name in names.items():
        weight, part = ranks.whole(stored), name.split(".")[-2]
        weight = unpermute(weight, heads[part]) if part in heads else weight
        yield name, cast(name, weight, dtype or weight.dtype)


def hugging_face_name(name: str) -> str:
    """`layers.3.attention.wq.weight` -> `model.layers.3.self_attn.q_proj.weight`.

    Raises:
        ModelError: a tensor that Llama 2 and 3 do not have.
    """
    layer = f"model.layers.{name.split('.')[1]}." if name.startswith("layers.") else ""
    return f"{layer}{_named(name)[0]}.weight"


def _named(name: str) -> tuple[str, int | None]:
    path, _, kind = name.rpartition(".")
    part = path.split(".", 2)[2] if path.startswith("layers.") and path.count(".") > 1 else path
    if part not in NAMES or kind != "weight":
        raise ModelError(f"Meta's tensor {name} belongs to neither Llama 2 nor 3")
    return NAMES[part]


def _ranks(source: Path, dim: int) -> list[dict[str, Tensor]]:
    """The files in the order of their numbers; how many there have to be is seen by what the first one holds."""
    first = source / "consolidated.00.pth"
    if not first.is_file():
        raise ModelError(f"{source}: missing {first.name}")
    held = load_tensors(first)
    if missing := [name for name in (OUTPUTS, "tok_embeddings.weight") if name not in held]:
        raise ModelError(f"{first}: lacks {', '.join(missing)}")
    files = [source / f"consolidated.{number:02d}.pth" for number in range(1, dim // held[OUTPUTS].shape[1])]
    if lost := [file.name for file in files if not file.is_file()]:
        raise ModelError(f"{source}: missing {', '.join(lost)}")
    return [held, *map(load_tensors, files)]


def _tied(ranks: Ranks) -> bool:
    """Whether the head is the embedding matrix, left out or stored again: the small models of Llama 3.2."""
    if "output.weight" not in ranks.names:
        return True
    if ranks.shape("output.weight") != ranks.shape("tok_embeddings.weight"):
        return False
    head, embedding = ranks.whole("output.weight"), ranks.whole("tok_embeddings.weight")
    return torch.equal(head[0], embedding[0]) and torch.equal(head, embedding)


def _tokenizer(source: Path) -> Path:
    for folder in (source, source.parent):
        if (folder / TOKENIZER).is_file():
            return folder / TOKENIZER
    raise ModelError(f"{source}: no {TOKENIZER}, neither there nor in the folder above")
