"""Llama 3's own `tokenizer.model`: a line for each token, its bytes in base64 and its rank, as tiktoken reads it.

What is not in the file is in Meta's code (`llama3/tokenizer.py`, `llama_models/llama3/tokenizer.py`): the pattern that
splits a text first, and the 256 special tokens behind the list. The `tokenizers` library runs it, which a run needs
anyway, and gives tiktoken's ids: the pairs that it merges are those whose join is a token, in the order of ranks, and a
word that is a token is taken whole. tiktoken itself would be one more dependency, to read a single kind of file.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from tuner.errors import ModelError
from tuner.tokenizers.files import read_json, tokens_beside
from tuner.tokenizers.huggingface import FastFolderTokenizer
from tuner.tokenizers.steps import LLAMA3_PATTERN

NUM_SPECIAL = 256
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
ROLES = {"bos_token": BEGIN, "eos_token": END}
LLAMA3 = [
    *(BEGIN, END, *(f"<|reserved_special_token_{i}|>" for i in range(4))),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]
LLAMA3_1 = [
    *(BEGIN, END, *(f"<|reserved_special_token_{i}|>" for i in range(2))),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248))),
]
"""From 3.1 on, as in the `tokenizer.json` of these models, which are known by their scaled rotary embedding."""


class TiktokenTokenizer(FastFolderTokenizer):
    """The tokenizer in a folder's list of tokens; see `tuner.types.Tokenizer`.

    Special tokens are those of Llama 3, or of 3.1 where `config.json` scales the rotary embedding, unless
    `added_tokens_decoder` in `tokenizer_config.json` names them.

    Raises:
        ModelError: if the list is damaged.
    """

    vocabulary_file = "tokenizer.model"

    def __init__(self, folder: Path) -> None:
        ranks = read_ranks(folder / self.vocabulary_file)
        super().__init__(folder, byte_level(ranks, special_tokens(folder, len(ranks))), ROLES)

    def save(self, folder: Path) -> None:
        """Beside its own files a `tokenizer.json`, since transformers takes `tokenizer.model` for sentencepiece's."""
        super().save(folder)
        self._tokenizer.save(str(folder / "tokenizer.json"))

    def _settings(self) -> dict[str, Any]:
        end = self._tokenizer.id_to_token(self.eos_id)
        return {**self.special_tokens, "eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}


def is_list_of_tokens(file: Path) -> bool:
    """Whether a file begins as such a list does."""
    with file.open("rb") as stream:
        return _parse(stream.readline(4096)) is not None


def read_ranks(file: Path) -> dict[bytes, int]:
    """Every token of a list and its rank, which is its id.

    Raises:
        ModelError: a line that is none, ranks that do not count from 0, or bytes that no token is.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        parsed = _parse(line)
        if parsed is None:
            raise ModelError(f"{file}:{number}: not a token in base64 and its rank")
        token, rank = parsed
        if rank != number - 1 or token in ranks:
            raise ModelError(f"{file}:{number}: rank {rank}; ranks count from 0 and each token has one")
        ranks[token] = rank
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ModelError(f"{file}: {len(missing)} of the 256 bytes are no tokens, {missing[0]:#04x} the first")
    return ranks


def _parse(line: bytes) -> tuple[bytes, int] | None:
    try:
        token, rank = line.split()
        return base64.b64decode(token, validate=True), int(rank)
    except (ValueError, binascii.Error):
        return None


def special_tokens(folder: Path, num_ranks: int) -> list[AddedToken]:
    """The special tokens of a folder, in the order of their ids, which begin at `num_ranks`.

    Raises:
        ModelError: if the files beside the list name one whose id is in the list, or leave an id out.
    """
    config = read_json(folder / "config.json")
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaled = scaling.get("rope_type") == "llama3" or read_json(folder / "params.json").get("use_scaled_rope")
    names: dict[int, dict[str, Any]] = {
        id_: {"content": name} for id_, name in enumerate(LLAMA3_1 if scaled else LLAMA3, num_ranks)
    }
    names |= {token["id"]: token for token in tokens_beside(folder, [])}
    if sorted(names) != list(range(num_ranks, num_ranks + len(names))):
        raise ModelError(
            f"{folder}: the ids of added tokens have to follow the {num_ranks} of tokenizer.model without a gap;"
            f" they are {min(names)} to {max(names)}"
        )
    ordered = (names[id_] for id_ in sorted(names))
    return [AddedToken(token["content"], normalized=False, **_flags(token)) for token in ordered]


def _flags(token: dict[str, Any]) -> dict[str, bool]:
    sides = {key: bool(token.get(key)) for key in ("lstrip", "rstrip", "single_word")}
    return {"special": bool(token.get("special", True)), **sides}


def byte_level(ranks: dict[bytes, int], special: list[AddedToken]) -> FastTokenizer:
    """The tokenizer that merges as the ranks say."""
    letters = _letters()
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:
        parts = [(token[:k], token[k:]) for k in range(1, len(token))]
        known = [(left, right) for left, right in parts if left in ranks and right in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelt[left], spelt[right]) for left, right in known]
    vocabulary = {spelt[token]: rank for token, rank in ranks.items()}
    tokenizer = FastTokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(special)
    bos = special[0].content
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, len(ranks))]
    )
    return tokenizer


def _letters() -> list[str]:
    """The letter that stands for each byte in the `tokenizers` library's byte-level vocabularies, from GPT-2's code."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]
