"""The packaged tokenizers: the same bytes each time, 512 tokens, and what transformers makes of the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from transformers import AutoTokenizer

from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.merges import merges
from tuner.tokenizers.packaged import KINDS, SIZE, write_packaged_tokenizer
from tuner.tokenizers.small_byte_level import BYTE_LEVEL
from tuner.tokenizers.small_sentencepiece import SENTENCEPIECE
from tuner.types import PackagedTokenizer

TEXTS = [
    "What does the object return?  Grüße, 世界 👋🏽",
    " a space, \ttabs and\n\nlines\r\n",
    "12345 it's\x00\x7f",
    "    four   three  two",
    "",
]
SPECIAL = "</s> <bos> <|end|> <|eot_id|> <|im_end|> <0x41> [INST]"
USER, REPLY = "Which value does it return?", "The name of the file."
SMALL = [kind for kind in KINDS if kind != "tiny"]
END = {
    "llama2": "</s>",
    "mistral": "</s>",
    "phi3": "<|end|>",
    "gemma": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "qwen": "<|im_end|>",
    "smollm2": "<|im_end|>",
}


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        write_packaged_tokenizer(kind, tmp_path / kind)
        return tmp_path / kind

    return make


def test_the_kinds_are_those_that_the_key_may_name() -> None:
    assert set(KINDS) == set(get_args(PackagedTokenizer)) == {"tiny", *END}


def test_no_merge_is_there_twice_and_each_has_its_parts() -> None:
    pairs = merges(1000)
    merged = [left + right for left, right in pairs]
    assert len(set(merged)) == len(pairs) == 253
    for i, (left, right) in enumerate(pairs):
        assert {part for part in (left, right) if len(part) > 1} <= set(merged[:i])


@pytest.mark.parametrize("kind", SMALL)
def test_it_is_written_the_same_again(kind: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of(kind)
    write_packaged_tokenizer(kind, tmp_path / "again")
    for name in {"tokenizer_config.json", "tokenizer.json" if kind in BYTE_LEVEL else "tokenizer.model"}:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert {kind in BYTE_LEVEL, kind in SENTENCEPIECE} == {True, False}


@pytest.mark.parametrize("kind", SMALL)
def test_it_is_the_same_in_transformers(kind: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(kind)
    ours, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(reference) == SIZE
    assert ours.eos_id == reference.eos_token_id
    assert ours.pad_id == (ours.eos_id if reference.pad_token_id is None else reference.pad_token_id)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == reference.decode(ids)
    messages = [{"role": "user", "content": USER}, {"role": "assistant", "content": REPLY}] * 2
    ids, _ = ours.encode_chat(messages)  # type: ignore[arg-type]
    assert ids == reference.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("kind", SMALL)
def test_text_comes_back_and_makes_no_control_token(kind: str, folder_of: Callable[[str], Path]) -> None:
    """A tokenizer that puts a space before a text takes one away again, as transformers does."""
    tokenizer = load_tokenizer(folder_of(kind))
    puts_a_space = kind in SENTENCEPIECE and SENTENCEPIECE[kind].dummy_prefix
    for text in (*TEXTS, SPECIAL):
        found = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)
        assert found == text or (puts_a_space and text.startswith(" ") and found == text[1:])


@pytest.mark.parametrize("kind", SMALL)
def test_replies_and_their_ends_are_trained(kind: str, folder_of: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(folder_of(kind))
    turns = [{"role": "user", "content": USER}, {"role": "assistant", "content": REPLY}]
    ids, trained = tokenizer.encode_chat(turns * 2)  # type: ignore[arg-type]
    text = tokenizer.decode([id_ for id_, is_trained in zip(ids, trained, strict=True) if is_trained])
    parts = [part.strip() for part in text.split(END[kind])]
    assert parts == [REPLY, REPLY, ""]
