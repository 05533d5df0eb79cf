"""The tokenizer in a GGUF file, as the files of a Hugging Face folder.

Kind `gpt2` is byte-level BPE and becomes a `tokenizer.json`; what splits text before it is known by a name
(`tokenizer.ggml.pre`). Kind `llama` is sentencepiece and becomes the `tokenizer.model` it once was, with the tokens
that were added to it in `tokenizer_config.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import ModelError
from tuner.models.sentencepiece_model import sentencepiece_model
from tuner.models.writing import write_json
from tuner.sentencepiece_model import CONTROL, UNUSED, USER_DEFINED

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern in the `tokenizer.json` of Llama 3 and of Qwen2, which differ in how many digits stand together."""

PRE_TOKENIZERS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), "llama-bpe"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), "qwen2"),
    "smollm": "smollm",
}
"""`tokenizer.ggml.pre`, with llama.cpp's further names for the same."""

PLACEHOLDER = re.compile(r"\[PAD\d+\]")
"""llama.cpp's converter names rows of the embedding that no token has."""


def write_tokenizer(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write the tokenizer's files.

    Args:
        folder: where to.
        meta: value of each key of the GGUF file.

    Raises:
        ModelError: a kind that is not known, or keys that it lacks.
    """
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    needed = {"gpt2": ("tokens", "token_type", "merges", "eos_token_id"), "llama": ("tokens", "token_type", "scores")}
    if kind not in needed or (kind == "gpt2" and pre not in PRE_TOKENIZERS):
        known = ", ".join(["llama", *(f"gpt2/{name}" for name in PRE_TOKENIZERS)])
        said = f"{kind}/{pre}" if kind == "gpt2" else kind
        raise ModelError(f"GGUF tokenizer {said} is not supported; valid: {known}")
    if missing := [key for key in needed[kind] if f"tokenizer.ggml.{key}" not in meta]:
        raise ModelError(f"lacks {', '.join(f'tokenizer.ggml.{key}' for key in missing)}")
    tokens = meta["tokenizer.ggml.tokens"]
    ids = {name: int(meta[key]) for name, key in SPECIAL.items() if key in meta}
    if wrong := [SPECIAL[name] for name, id_ in ids.items() if not 0 <= id_ < len(tokens)]:
        raise ModelError(f"{wrong[0]} is none of {len(tokens)} tokens")
    names = {name: tokens[id_] for name, id_ in ids.items()}
    if kind == "gpt2":
        byte_level(meta).save(str(folder / "tokenizer.json"))
        settings: dict[str, Any] = {"clean_up_tokenization_spaces": False, **_longest(meta)}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(meta))
        settings = _sentencepiece_settings(meta)
    template = {"chat_template": meta["tokenizer.chat_template"]} if "tokenizer.chat_template" in meta else {}
    write_json(folder / "tokenizer_config.json", {**names, **template, **settings})
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")


def _longest(meta: Mapping[str, Any]) -> dict[str, int]:
    return {"model_max_length": meta[f"{meta['general.architecture']}.context_length"]}


def byte_level(meta: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that the keys describe."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    vocabulary = {
        token: id_
        for id_, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if not (type_ == UNUSED and PLACEHOLDER.fullmatch(token))
    }
    pre = PRE_TOKENIZERS[meta["tokenizer.ggml.pre"]]
    # Llama 3's own file takes a word that is a token as it is, whether or not merges lead to it.
    whole = {"ignore_merges": True} if pre == "llama-bpe" else {}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **whole))
    except Exception as error:  # the library raises nothing more precise
        raise ModelError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if meta.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        _begin_with(tokenizer, tokens, meta["tokenizer.ggml.bos_token_id"])
    tokenizer.add_special_tokens(_added(tokens, types, CONTROL))
    tokenizer.add_tokens(_added(tokens, types, USER_DEFINED))
    return tokenizer


def _added(tokens: list[str], types: list[int], kind: int) -> list[AddedToken]:
    from tokenizers import AddedToken

    chosen = [token for token, type_ in zip(tokens, types, strict=True) if type_ == kind]
    return [AddedToken(token, special=kind == CONTROL, normalized=False) for token in chosen]


def _pre_tokenizer(pre: str) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    if pre == "smollm":  # every digit alone, then GPT-2's own pattern
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    pattern = SPLIT.replace("DIGITS", "{1,3}" if pre == "llama-bpe" else "")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), bytes_of])


def _begin_with(tokenizer: Tokenizer, tokens: list[str], bos: int) -> None:
    """Let the tokenizer put the first token before a text where special tokens are asked for."""
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]}:1 $B:1", special_tokens=[(tokens[bos], bos)]
    )


def _sentencepiece_settings(meta: Mapping[str, Any]) -> dict[str, Any]:
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    added = {
        str(id_): {
            **{"content": token, "special": type_ == CONTROL, "normalized": False},
            **{"lstrip": False, "rstrip": False, "single_word": False},
        }
        for id_, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ in (CONTROL, USER_DEFINED)
    }
    return {
        "add_bos_token": meta.get("tokenizer.ggml.add_bos_token", True),  # llama.cpp's own defaults for this kind
        "add_eos_token": meta.get("tokenizer.ggml.add_eos_token", False),
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        **_longest(meta),
        "tokenizer_class": "GemmaTokenizer" if meta["general.architecture"].startswith("gemma") else "LlamaTokenizer",
    }
