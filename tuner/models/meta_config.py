"""What Meta's `params.json` says of a Llama, and what it leaves to be known.

The context a model was trained for is in no file. It is 4096 for Llama 2, 16384 for Code Llama, 8192 for Llama 3 and
131072 from 3.1 on, as in the `config.json` of these models on the Hugging Face Hub; a file of Llama 1 (2048) cannot be
told from one of Llama 2. The rotary scaling is known by `use_scaled_rope` alone: Meta's code divides by 8
(`apply_scaling` in `llama_models/llama3/model.py`), the published `config.json` of the 1B and 3B models of 3.2 by 32.
These are the ones whose head is their embedding matrix.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.errors import ModelError
from tuner.models.gguf_config import LLAMA3
from tuner.models.llama import LlamaConfig

PARAMS = "params.json"
TOKENIZER = "tokenizer.model"
REQUIRED = ("dim", "n_layers", "n_heads", "norm_eps")
SHAPES_SAY = ("vocab_size", "multiple_of", "ffn_dim_multiplier")
OPTIONAL = ("n_kv_heads", "rope_theta", "use_scaled_rope")
EMBEDDING = "model.embed_tokens.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
VOCABULARY_OF_LLAMA3 = 100_000
"""More tokens than any Llama before it has, and fewer than Llama 3 (128256)."""


def read_params(source: Path) -> dict[str, Any]:
    """`params.json` of a folder.

    Raises:
        ModelError: not JSON, a key that is missing or no number, or one that Llama 2 and 3 do not have.
    """
    file = source / PARAMS
    try:
        params = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not JSON ({error})") from error
    if not isinstance(params, dict):
        raise ModelError(f"{file}: not a JSON object")
    if missing := [key for key in REQUIRED if key not in params]:
        raise ModelError(f"{file} lacks {', '.join(missing)}")
    if wrong := [key for key in REQUIRED if not isinstance(params[key], int | float)]:
        raise ModelError(f"{file}: {wrong[0]}={params[wrong[0]]!r} is no number")
    counts = [key for key in ("dim", "n_layers", "n_heads", "n_kv_heads") if params.get(key) is not None]
    if wrong := [key for key in counts if type(params[key]) is not int or params[key] <= 0]:
        raise ModelError(f"{file}: {wrong[0]}={params[wrong[0]]!r} is no whole number > 0")
    if unknown := [key for key in params if key not in (*REQUIRED, *SHAPES_SAY, *OPTIONAL)]:
        known = ", ".join(sorted((*REQUIRED, *SHAPES_SAY, *OPTIONAL)))
        raise ModelError(f"{file}: {', '.join(unknown)} is of no Llama 2 or 3; known: {known}")
    return params


def config_of(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> LlamaConfig:
    """The configuration of a checkpoint.

    Args:
        params: as `read_params` returns them.
        shapes: of the whole tensors, by Hugging Face's names.
        tied: whether the head is the embedding matrix.
    """
    theta, scaled = params.get("rope_theta", 10000.0), params.get("use_scaled_rope", False)
    if GATE not in shapes:
        raise ModelError(f"lacks {GATE}")
    vocabulary = shapes[EMBEDDING][0]
    config = {
        "vocab_size": vocabulary,  # params.json of Llama 2 says -1
        "hidden_size": params["dim"],
        "intermediate_size": shapes[GATE][0],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "max_position_embeddings": _context(theta, vocabulary, scaled=scaled),
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": theta,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0 if tied else 8.0, **LLAMA3} if scaled else None,
        "tie_word_embeddings": tied,
    }
    return LlamaConfig.from_hugging_face(config, None)


def _context(theta: float, vocabulary: int, *, scaled: bool) -> int:
    if scaled:
        return 131072
    if vocabulary > VOCABULARY_OF_LLAMA3:
        return 8192
    return 4096 if theta == 10000.0 else 16384


def special_ids(tokenizer: Path) -> dict[str, int]:
    """The tokens that begin and end a text, by the tokenizer's file.

    Raises:
        ModelError: an empty file, one of neither kind, or a model that has no such token.
    """
    content = tokenizer.read_bytes()
    if not content:
        raise ModelError(f"{tokenizer} is empty")
    if (ranks := _tiktoken_ranks(content)) is not None:
        return {"bos_token_id": ranks, "eos_token_id": ranks + 1}  # the first two behind it, in Meta's tokenizer.py
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ModelError(f"{tokenizer}: neither a sentencepiece model nor a list of tokens for tiktoken") from error
    ids = {"bos_token_id": pieces.bos_id(), "eos_token_id": pieces.eos_id()}
    if wrong := [key for key, id_ in ids.items() if id_ < 0]:
        raise ModelError(f"{tokenizer}: the sentencepiece model has no {' and no '.join(wrong)}")
    return ids


def _tiktoken_ranks(content: bytes) -> int | None:
    """How many lines `base64 rank` there are, None where the first is none."""
    lines = content.splitlines()
    try:
        token, rank = lines[0].split()
        base64.b64decode(token, validate=True)
        return len(lines) if int(rank) == 0 else None
    except (ValueError, IndexError):
        return None
