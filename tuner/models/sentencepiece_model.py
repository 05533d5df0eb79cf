"""The `tokenizer.model` of the tokens in a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.errors import ModelError
from tuner.sentencepiece_model import SPACE, UNKNOWN, USER_DEFINED
from tuner.sentencepiece_model import sentencepiece_model as written

ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}
"""sentencepiece's names and those in a GGUF file."""


def sentencepiece_model(meta: Mapping[str, Any]) -> bytes:
    """The content of a `tokenizer.model`.

    Args:
        meta: value of each key of the GGUF file: tokens, their scores and types, and what text is begun with.

    Raises:
        ModelError: no unknown token, which sentencepiece cannot do without.
    """
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    if types.count(UNKNOWN) != 1:
        raise ModelError(
            f"tokenizer.ggml.token_type has {types.count(UNKNOWN)} unknown tokens, sentencepiece needs one"
        )
    # llama.cpp's converter spells the spaces of user-defined tokens, and of no others, as spaces.
    pieces = [
        token.replace(" ", SPACE) if type_ == USER_DEFINED else token
        for token, type_ in zip(tokens, types, strict=True)
    ]
    return written(
        list(zip(pieces, meta["tokenizer.ggml.scores"], types, strict=True)),
        {
            "unk": types.index(UNKNOWN),
            **{role: meta.get(f"tokenizer.ggml.{key}_token_id", -1) for role, key in ROLES.items()},
        },
        dummy_prefix=meta.get("tokenizer.ggml.add_space_prefix", True),
        remove_extra_whitespaces=meta.get("tokenizer.ggml.remove_extra_whitespaces", False),
    )
