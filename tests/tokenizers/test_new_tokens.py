"""Tokens that a tokenizer learns, against transformers' `add_tokens` on the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tuner.errors import ModelError
from tuner.tokenizers import has_tokenizer, load_tokenizer
from tuner.tokenizers.tiny import write_tiny_tokenizer
from tuner.types import Message

NEW = ["<|tool|>", "<|/tool|>", "世界", "a b", "  x"]
TEXTS = [
    "",
    "<|tool|>",
    "say <|tool|> {'q': 1}<|/tool|>\n",
    "<|tool|><|tool|>x<|/tool|",
    "Hallo 世界!世 界 👋🏽 a b ab a  b   x\x00\t  x",
    "<|im_start|>user\n<|tool|><|im_end|>",
    "<|TOOL|> <|tool |>",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def test_texts_are_encoded_as_transformers_does(folder: Path) -> None:
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.add_tokens(NEW)
    before = len(theirs)
    assert theirs.add_tokens(NEW) == len(NEW)
    assert ids == theirs.convert_tokens_to_ids(NEW) == list(range(before, before + len(NEW)))
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, control_tokens=True) == expected
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.decode(expected) == theirs.decode(expected, clean_up_tokenization_spaces=False) == text
    assert {*ours.encode(TEXTS[2])} >= {*ids[:2]}


def test_they_are_shown_where_control_tokens_are_not(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(NEW)
    ids = tokenizer.encode("<|tool|>1<|/tool|><|im_end|>", control_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<|tool|>1<|/tool|>"


def test_a_reply_is_trained_with_those_in_it(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    (tool, end, *_) = tokenizer.add_tokens(NEW)
    reply = "<|tool|>2<|/tool|>"
    messages = [Message(role="user", content="<|tool|>?"), Message(role="assistant", content=reply)]
    ids, mask = tokenizer.encode_chat(messages)
    assert [id_ for id_, trained in zip(ids, mask, strict=True) if trained] == [
        *(tool, *tokenizer.encode("2"), end),
        tokenizer.eos_id,
    ]


def test_a_saved_folder_is_the_same_tokenizer_here_and_there(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(NEW[:2])
    tokenizer.add_tokens(NEW[2:])
    tokenizer.save(tmp_path / "saved")
    assert has_tokenizer(tmp_path / "saved")
    again, theirs = load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (again.vocab_size, again.eos_id, again.pad_id) == (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    assert len(theirs) == tokenizer.vocab_size
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False)
        assert again.encode(text, control_tokens=True) == tokenizer.encode(text, control_tokens=True) == expected
        assert again.encode(text) == tokenizer.encode(text)
    messages = [Message(role="user", content="<|tool|>?")]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert load_tokenizer(folder).encode(NEW[0]) != tokenizer.encode(NEW[0])  # what it was read from stays


def test_files_that_repeat_the_list_have_them_too(folder: Path, tmp_path: Path) -> None:
    """As transformers 4 wrote them, with the end token in config.json alone."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    listed = {"2": {"content": "<|im_end|>", "special": True}}
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": listed}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 2}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    tokenizer = load_tokenizer(folder)
    (first, second) = tokenizer.add_tokens(["<|tool|>", "世界"])
    tokenizer.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["added_tokens_decoder"][str(first)]["content"] == "<|tool|>"
    assert saved["added_tokens_decoder"]["2"] == listed["2"]
    expected = {"<|im_end|>": 2, "<|tool|>": first, "世界": second}
    assert json.loads((tmp_path / "saved" / "added_tokens.json").read_text()) == expected
    assert load_tokenizer(tmp_path / "saved").eos_id == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token_id == 2


def test_tokens_that_are_there_are_refused_together(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    known = tokenizer.encode("the")
    with pytest.raises(ModelError) as error:
        tokenizer.add_tokens(["<|tool|>", "<|im_end|>", "he"])
    assert "'<|im_end|>' (id 2), 'he' (id " in str(error.value)
    assert "<|tool|>" not in str(error.value)
    assert tokenizer.encode("the") == known
    assert len(tokenizer.encode("<|tool|>")) > 1
