"""Tokens that a tokenizer learns: which may be, and the files beside the vocabulary that list them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.errors import ModelError

TEXT_TOKENS = "text_tokens"
"""A key of `tokenizer_config.json`, which others pass over: tokens that were learnt and stand in texts, also where they
look like control tokens."""


def require_new(ids: Mapping[str, int | None], folder: Path) -> None:
    """Refuse tokens that have an id already.

    One of the vocabulary is trained already, or is a piece of words, which would be encoded otherwise from then on.

    Args:
        ids: of each token, None for one that is new.
        folder: of the tokenizer.

    Raises:
        ModelError: naming all of them with their ids.
    """
    if known := [f"{token!r} (id {id_})" for token, id_ in ids.items() if id_ is not None]:
        raise ModelError(
            f"model.add_tokens: {', '.join(known)} {'is' if len(known) == 1 else 'are'} in the vocabulary of {folder} "
            "already and can be used as it is; leave it out"
        )


def write_new_tokens(folder: Path, tokens: Mapping[str, int], text_tokens: Sequence[str], end: str | None) -> None:
    """Write tokens into the files of a tokenizer's folder that list added ones beside the vocabulary.

    Args:
        folder: holds the files as they were before.
        tokens: ids of the new ones.
        text_tokens: these and those that were learnt earlier.
        end: the end token, named where no role is: beside an adapter there is no config.json that would say it.
    """
    settings = _read(folder / "tokenizer_config.json")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
    if listed := settings.get("added_tokens_decoder"):
        listed |= {str(id_): {"content": token, **flags} for token, id_ in tokens.items()}
    roles = {"eos_token": settings.get("eos_token") or end}
    _write(folder / "tokenizer_config.json", {**settings, **roles, TEXT_TOKENS: list(text_tokens)})
    older = folder / "added_tokens.json"
    if older.is_file() or not (listed or (folder / "tokenizer.json").is_file()):
        _write(older, {**_read(older), **tokens})


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _write(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
