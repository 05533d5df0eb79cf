"""Packaged tokenizers of 512 tokens in the manner of Llama 2, Mistral, Gemma and Phi-3: sentencepiece's BPE.

Each is a `tokenizer.model` with a piece for every printable ASCII character, what is not spelled by pieces being bytes,
and the tokens that its family has around these.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.sentencepiece_model import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, sentencepiece_model
from tuner.tokenizers.merges import merges
from tuner.tokenizers.small_templates import GEMMA, LLAMA2, MISTRAL, PHI3

NUM_BYTES = 256
CHARACTERS = (SPACE, *string.ascii_letters, *string.digits, *string.punctuation)

Piece = tuple[str, float, int]


@dataclass(frozen=True)
class SentencePiece:
    """What a family's tokenizer is.

    Attributes:
        first: pieces before the bytes, each with its type.
        roles: role of a special token (`bos_token`, ...) to its text.
        template: its chat template.
        added: special tokens behind those of the model file, named in `tokenizer_config.json`.
        dummy_prefix: a space is put before a text.
        settings: further keys of `tokenizer_config.json`.
    """

    first: tuple[tuple[str, int], ...]
    roles: dict[str, str]
    template: str
    settings: dict[str, Any]
    added: tuple[str, ...] = ()
    dummy_prefix: bool = True


FIRST = (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL))
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "legacy": False}

SENTENCEPIECE = {
    "llama2": SentencePiece(FIRST, ROLES, LLAMA2, LLAMA),
    "mistral": SentencePiece(FIRST, ROLES, MISTRAL, LLAMA),
    "phi3": SentencePiece(
        FIRST,
        {**ROLES, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        PHI3,
        LLAMA,
        added=("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
    ),
    "gemma": SentencePiece(
        (
            ("<pad>", CONTROL),
            ("<eos>", CONTROL),
            ("<bos>", CONTROL),
            ("<unk>", UNKNOWN),
            *((token, USER_DEFINED) for token in ("<mask>", "<start_of_turn>", "<end_of_turn>")),
            *((lines * "\n", USER_DEFINED) for lines in (1, 2)),
            *((spaces * SPACE, USER_DEFINED) for spaces in (2, 3, 4)),
        ),
        {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
        GEMMA,
        {"tokenizer_class": "GemmaTokenizer"},
        dummy_prefix=False,
    ),
}


def write_sentencepiece(kind: str, size: int, folder: Path) -> None:
    """Write `tokenizer.model` and `tokenizer_config.json` into `folder`, the same bytes each time.

    Args:
        kind: a key of `SENTENCEPIECE`.
        size: tokens it has, those in `tokenizer_config.json` among them.
        folder: made if it is not there.
    """
    family = SENTENCEPIECE[kind]
    pieces = list(_pieces(family, size - len(family.added)))
    ids = {text: id_ for id_, (text, _, _) in enumerate(pieces)}
    roles = {role: ids.get(family.roles.get(f"{role}_token", ""), -1) for role in ("unk", "bos", "eos", "pad")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces, roles, dummy_prefix=family.dummy_prefix))
    special = [text for text, _ in family.first if text.startswith("<")]
    ids |= {text: len(pieces) + i for i, text in enumerate(family.added)}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(ids[text]): _added(text) for text in (*special, *family.added)},
        **family.roles,
        "clean_up_tokenization_spaces": False,
        "chat_template": family.template,
        **family.settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _pieces(family: SentencePiece, size: int) -> Iterator[Piece]:
    """The pieces of the model file; of those that spell text the earlier has the higher score, and is merged first."""
    yield from ((text, 0.0, type_) for text, type_ in family.first)
    yield from ((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(NUM_BYTES))
    number = size - len(family.first) - NUM_BYTES - len(CHARACTERS)
    merged = [(left + right).replace("Ġ", SPACE) for left, right in merges(number)]
    yield from ((text, -float(i), NORMAL) for i, text in enumerate([*merged, *CHARACTERS]))


def _added(text: str) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": text, **flags, "special": True}
