"""The files that a folder has for its tokenizer, and what those beside the vocabulary say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuner.errors import ModelError

CHAT_TEMPLATE = "chat_template.jinja"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    CHAT_TEMPLATE,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Every file that may belong to a tokenizer; the first or the last has to exist."""

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def sum_of(file: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, empty if there is no such file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a {type(content).__name__}, not an object")
    return content


def tokens_beside(folder: Path, special: Sequence[str]) -> list[dict[str, Any]]:
    """Tokens beside a vocabulary: `added_tokens_decoder` of `tokenizer_config.json`, or the older `added_tokens.json`.

    Args:
        folder: holds the files.
        special: what is special though `added_tokens.json` cannot say it.

    Returns:
        `content` and `id` of each, and the flags that are given.

    Raises:
        ModelError: if one has no id or no content.
    """
    named = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if not named:
        older = read_json(folder / "added_tokens.json")
        named = {id_: {"content": token, "special": token in special} for token, id_ in older.items()}
    try:
        return [{**token, "content": str(token["content"]), "id": int(id_)} for id_, token in named.items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder}: added_tokens_decoder of tokenizer_config.json, or added_tokens.json, lacks an id or a content"
            f" ({type(error).__name__}: {error})"
        ) from error


def write_chat_template(folder: Path, source: str) -> None:
    """Make a template that of a folder, in the one place where it is looked for first."""
    (folder / CHAT_TEMPLATE).write_text(source, encoding="utf-8")
    settings = read_json(file := folder / "tokenizer_config.json")
    if settings.pop("chat_template", None) is not None:
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
