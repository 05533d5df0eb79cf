"""Texts encoded word by word have the tokens, ends and masks of texts encoded whole."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tuner.tokenizers import load_tokenizer, words
from tuner.tokenizers.huggingface import FastFolderTokenizer
from tuner.tokenizers.packaged import KINDS, write_packaged_tokenizer
from tuner.tokenizers.steps import words_are_apart
from tuner.types import Message

WITH_WORDS = ("tiny", "llama3", "qwen", "smollm2")
PIECES = [
    *("", " ", "  ", "    ", "\n", "\n\n", "\n  ", " \n", "\t", "\t ", "\r\n", "\x00", "\x0b", "\x1c", "\x85", "\xa0"),
    *("\u2003", "\u2028", "\u3000", "\u200b", "a", "the", " the", "Hello", " of", "x" * 40, "don't", " 's", "'LL", "5"),
    *(" 2024", "٣", "²", "Ⅷ", ".", ",", ".\n", ")\n\n", "#", "_", "/", "—", "é", "e\u0301", " \u0301", "5\u0301"),
    *("Å", "\u212b", "İ", "ﬁ", "가", "\u1100\u1161", "世界", "。", "👋🏽", "👩‍👩‍👧", "𝔘", "\ue000", "<", "<|", "|>"),
    *("<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|endoftext|>", "<|start_header_id|>", "</s>", "<think>"),
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("tokenizers")

    def of(kind: str) -> Path:
        if not (folder / kind).exists():
            write_packaged_tokenizer(kind, folder / kind)
        return folder / kind

    return of


def _loaded(folder: Path) -> FastFolderTokenizer:
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, FastFolderTokenizer)
    return tokenizer


def _texts(seed: int, number: int) -> list[str]:
    """Random ones, of pieces that a boundary may lie between and of any characters."""
    draw = random.Random(seed)

    def piece() -> str:
        first, last = draw.choice([(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x3000, 0x30FF), (0x1F300, 0x1F6FF)])
        return draw.choice(PIECES) if draw.random() < 0.8 else chr(draw.randint(first, last))

    return ["".join(piece() for _ in range(draw.randint(0, 30))) for _ in range(number)]


def test_byte_level_tokenizers_have_words(folder_of: Callable[[str], Path]) -> None:
    has = {kind: bool(getattr(load_tokenizer(folder_of(kind)), "_words", None)) for kind in KINDS}
    assert has == {kind: kind in WITH_WORDS for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_WORDS)
def test_tokens_and_ends_are_those_of_the_whole_text(kind: str, folder_of: Callable[[str], Path]) -> None:
    tokenizer = _loaded(folder_of(kind))
    texts = _texts(1, 1200)
    whole = tokenizer._encode_whole(texts)
    assert tokenizer._words is not None
    assert tokenizer._words.encode(texts) == whole, "all at once"
    fresh = words.Words(tokenizer._tokenizer)
    assert [fresh.encode([text])[0] for text in texts] == whole, "one by one"
    tokenizer.add_tokens(["Hello", "xxx", ". "])
    assert tokenizer._words.encode(texts) == tokenizer._encode_whole(texts) != whole, "with tokens that were added"


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_WORDS)
def test_masks_are_those_of_the_whole_text(kind: str, folder_of: Callable[[str], Path]) -> None:
    by_words, by_texts = _loaded(folder_of(kind)), _loaded(folder_of(kind))
    by_texts.__dict__["_words"] = None
    texts = iter(_texts(2, 800))
    conversations: list[list[Message]] = [
        [{"role": role, "content": f"{text}."} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]
        for _ in range(200)
    ]
    for last_only in (False, True):
        found = by_words.encode_chats(conversations, last_reply_only=last_only)
        assert found == by_texts.encode_chats(conversations, last_reply_only=last_only)
        assert all(any(mask) for _, mask in found)


def test_words_are_forgotten_when_they_are_too_many(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "ROOM", 100)
    tokenizer = _loaded(folder_of("qwen"))
    known = words.Words(tokenizer._tokenizer)
    texts = _texts(3, 300)
    assert [known.encode([text])[0] for text in texts] == tokenizer._encode_whole(texts)
    known.encode([" ".join(f"word{i}" for i in range(200))])
    assert not known._ids


DEPENDENT: dict[str, dict[str, Any]] = {
    "a space is put before the text": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    "nothing is split": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
    "a pattern that nobody looked at": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+ \w+"}}},
    "spaces are changed": {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"}},
    "ends leave spaces out": {"post_processor": {"type": "ByteLevel", "trim_offsets": True}},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "Split": {"behavior": "Isolated", "invert": False},
    "ByteLevel": {"add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "Replace": {},
}


@pytest.mark.parametrize("said", DEPENDENT)
def test_where_words_depend_on_each_other_texts_are_encoded_whole(said: str, folder_of: Callable[[str], Path]) -> None:
    content = json.loads((folder_of("tiny") / "tokenizer.json").read_text())
    assert words_are_apart(Tokenizer.from_str(json.dumps(content)))
    changed = {key: {**DEFAULTS[step["type"]], **step} for key, step in DEPENDENT[said].items()}
    assert not words_are_apart(Tokenizer.from_str(json.dumps({**content, **changed})))


@pytest.mark.parametrize("flag", ["normalized", "lstrip", "rstrip", "single_word"])
def test_added_tokens_that_look_around_are_found_in_whole_texts(flag: str, folder_of: Callable[[str], Path]) -> None:
    content = json.loads((folder_of("tiny") / "tokenizer.json").read_text())
    content["added_tokens"][0][flag] = True
    assert not words_are_apart(Tokenizer.from_str(json.dumps(content)))
