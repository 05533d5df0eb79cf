"""A Hugging Face folder as a GGUF file, as llama.cpp's converter lays it out: what our reading of one is held against.

Written with the `gguf` library's own writer, tables of names and quantizers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, RopeScalingType, get_tensor_name_map
from gguf.quants import quantize
from safetensors.torch import load_file
from torch import Tensor

ARCHITECTURE = {"mistral": "llama"}


def write_gguf(
    folder: Path,
    file: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    tokenizer: Callable[[GGUFWriter], None] | None = None,
    edit: Callable[[GGUFWriter], None] = lambda writer: None,
) -> dict[str, Tensor]:
    """Write `file`; returns the weights in it by their names in the folder, as they are after quantization.

    Args:
        folder: with one safetensors file.
        file: to write.
        kind: of the matrices; vectors are fp32 always.
        tokenizer: adds the tokenizer's keys; None adds a tokenizer of bytes.
        edit: adds further keys or tensors.
    """
    from gguf.quants import dequantize

    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURE.get(config["model_type"], config["model_type"])
    writer = GGUFWriter(file, architecture)
    add_keys(writer, config)
    (tokenizer or add_bytes)(writer)
    (number,) = [key for key, name in MODEL_ARCH_NAMES.items() if name == architecture]
    table = get_tensor_name_map(number, config["num_hidden_layers"])
    for name, factors in rope_tensors(config).items():
        writer.add_tensor(name, np.array(factors, dtype=np.float32))
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored = changed(name, weight.float(), config, architecture).numpy()
        of = kind if stored.ndim > 1 else GGMLQuantizationType.F32
        data = quantize(np.ascontiguousarray(stored), of)
        path, _, end = name.rpartition(".")
        writer.add_tensor(f"{table.get_name(path)}.{end}", data, raw_dtype=of)
        weights[name] = unchanged(name, torch.from_numpy(dequantize(data, of).copy()), config, architecture)
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def heads_of(name: str, config: Mapping[str, Any], architecture: str) -> int | None:
    """How many heads' rotary pairs are put side by side in a tensor."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    return heads.get(name.split(".")[-2]) if architecture == "llama" else None


def changed(name: str, weight: Tensor, config: Mapping[str, Any], architecture: str) -> Tensor:
    if heads := heads_of(name, config, architecture):
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)
    return weight + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else weight


def unchanged(name: str, weight: Tensor, config: Mapping[str, Any], architecture: str) -> Tensor:
    if heads := heads_of(name, config, architecture):
        pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
        return pairs.swapaxes(1, 2).reshape(weight.shape)
    return weight - 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else weight


def rope_tensors(config: Mapping[str, Any]) -> dict[str, list[float]]:
    rope = config["rope_parameters"]
    if rope["rope_type"] == "longrope":
        return {
            "rope_factors_long.weight": rope["long_factor"],
            "rope_factors_short.weight": rope["short_factor"],
        }
    if rope["rope_type"] != "llama3":
        return {}
    factors = []
    for exponent in torch.arange(0, config["head_dim"], 2).float() / config["head_dim"]:
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** float(exponent))
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": factors}


def add_keys(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """As the converter's class of each family."""
    family, rope = config["model_type"], config["rope_parameters"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if family not in ("gemma", "gemma2"):
        writer.add_rope_freq_base(rope["rope_theta"])
    if config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family in ("llama", "mistral", "phi3"):
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if family == "mistral" and config["sliding_window"]:
        writer.add_sliding_window(config["sliding_window"])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        writer.add_sliding_window(config["sliding_window"])
    if family == "phi3":
        add_phi3_keys(writer, config)


def add_phi3_keys(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    first = config["original_max_position_embeddings"]
    writer.add_sliding_window(config["sliding_window"] or 0)
    writer.add_rope_scaling_orig_ctx_len(first)
    if config["rope_parameters"]["rope_type"] == "longrope":
        stretched = config["max_position_embeddings"] / first
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(stretched) / math.log(first)))


def add_bytes(writer: GGUFWriter) -> None:
    """A tokenizer of single bytes."""
    from tokenizers import pre_tokenizers

    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa"]
    add_bpe(writer, "qwen2", tokens, [3] + [1] * 257, ["Ġ a"], eos=0)


def add_bpe(writer: GGUFWriter, pre: str, tokens: list[str], types: list[int], merges: list[str], eos: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(eos)
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(eos)  # or transformers takes Phi-3's own, which a small vocabulary does not have
