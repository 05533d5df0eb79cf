"""From a GGUF file to a Hugging Face folder, through the `gguf` library's own dequantizer.

GGUF stores the rows of q and k so that rotary pairs are neighbours; Hugging Face keeps the two halves of a head apart,
so the rows are put back. The tokenizer is written from the file's own tokens and merges.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.errors import ModelError
from tuner.models.folder import save_weights, write_json
from tuner.models.llama import LlamaConfig

CONVERTER_VERSION = 1
"""Of what `convert` writes; a higher number leaves the folders in people's caches unused and makes new ones."""

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of a token that text cannot spell."""


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in NAMES:
        raise ModelError(f"GGUF tensor {name} belongs to no supported architecture")
    prefix = f"model.layers.{match[1]}." if match[1] is not None else ""
    return f"{prefix}{NAMES[match[2]]}.{match[3]}"


def unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Undo GGUF's order of the rows of q or k, [heads * E, D]: pairs (2i, 2i+1) become (i, i + E/2)."""
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the Hugging Face folder of a GGUF file: fp32 weights, config, tokenizer and chat template.

    Args:
        gguf_file: of the llama architecture, in any type that the `gguf` library dequantizes.
        folder: made if it is not there; the caller renames it into place when it is whole.

    Raises:
        ModelError: another architecture or tokenizer, or no `gguf` library.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise ModelError("reading a GGUF file needs the gguf library: pip install gguf") from error
    reader = GGUFReader(gguf_file)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.t")}
    meta = {name: field.contents() for name, field in fields.items()}
    config = _config(meta, {tensor.name for tensor in reader.tensors})
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for stored in reader.tensors:
        name = hugging_face_name(stored.name)
        weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        part = name.split(".")[-2]
        tensors[name] = unpermute(weight, heads[part]) if part in heads else weight
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    bos, eos = meta["tokenizer.ggml.bos_token_id"], meta["tokenizer.ggml.eos_token_id"]
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": meta["tokenizer.ggml.padding_token_id"]}
    save_weights(folder, {**config.to_hugging_face(), **ids}, tensors)
    _write_tokenizer(folder, meta, tokens, types)


def _config(meta: dict[str, Any], tensors: set[str]) -> LlamaConfig:
    if (architecture := meta["general.architecture"]) != "llama":
        raise ModelError(f"GGUF architecture {architecture!r} is not supported; valid: llama")
    return LlamaConfig(
        path=None,
        package=None,
        random_weights=False,
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta["llama.rope.dimension_count"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_theta=meta["llama.rope.freq_base"],
        rope_scaling=None,
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias=False,
        mlp_bias=False,
    )


def _write_tokenizer(folder: Path, meta: dict[str, Any], tokens: list[str], types: list[int]) -> None:
    kind, pre = meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]
    if (kind, pre) != ("gpt2", "smollm"):
        raise ModelError(f"GGUF tokenizer {kind}/{pre} is not supported; valid: gpt2/smollm")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # llama.cpp's `smollm`: every digit alone, then GPT-2's own pattern.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(token, special=True) for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {name: tokens[meta[f"tokenizer.ggml.{key}_token_id"]] for name, key in SPECIAL.items()}
    template = meta["tokenizer.chat_template"]
    settings = {
        **names,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", settings)
    special = json.dumps(names, indent=2)
    (folder / "special_tokens_map.json").write_text(special + "\n", encoding="utf-8")


SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
