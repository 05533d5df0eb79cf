"""Which files of a folder say what, and what is said when they do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tuner.errors import ModelError
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.tiny import SPECIAL_TOKENS, write_tiny_tokenizer

TEXT = "def the_thing(in_the):\n\treturn 'Grüße, 世界 👋🏽'  # and of that, it is<|im_end|>\r\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def _configure(folder: Path, name: str = "tokenizer_config.json", **settings: object) -> None:
    (folder / name).write_text(json.dumps(settings), encoding="utf-8")


def test_tiny_is_the_same_in_transformers(folder: Path) -> None:
    ours, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(TEXT, control_tokens=True)
    assert ids == reference.encode(TEXT, add_special_tokens=False)
    assert ours.decode(ids) == TEXT
    assert ours.decode(ids, skip_special_tokens=True) == TEXT.replace("<|im_end|>", "")
    assert ours.encode(TEXT) == reference.encode(TEXT, add_special_tokens=False, split_special_tokens=True)
    assert ours.decode(ours.encode(TEXT), skip_special_tokens=True) == TEXT
    assert ours.vocab_size == len(reference) <= 512
    assert (ours.eos_id, ours.pad_id) == (reference.eos_token_id, reference.pad_token_id)


def test_tiny_writes_the_same_bytes_and_uses_every_merge(folder: Path, tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    merged = range(len(SPECIAL_TOKENS) + 256, tokenizer.get_vocab_size())
    assert [tokenizer.encode(tokenizer.decode([id_])).ids for id_ in merged] == [[id_] for id_ in merged]


def test_settings_of_the_last_call_in_tokenizer_json_are_dropped(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = tokenizer.encode(TEXT).ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=500)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode(TEXT, control_tokens=True) == expected


def test_a_role_makes_a_token_of_the_vocabulary_special(folder: Path) -> None:
    """As transformers does, for a `tokenizer.json` that does not list its end token among those that are added."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|im_end|>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    ours, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode(TEXT, control_tokens=True) == reference.encode(TEXT, add_special_tokens=False)
    ids = ours.encode(TEXT, control_tokens=True)
    assert ids.count(ours.eos_id) == 1
    assert ours.encode(TEXT) == reference.encode(TEXT, add_special_tokens=False, split_special_tokens=True)
    assert ours.eos_id not in ours.encode(TEXT)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    _configure(folder, **settings, additional_special_tokens=["Ġthe"])
    ours, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode("of Ġthe words", control_tokens=True)
    assert ids == reference.encode("of Ġthe words", add_special_tokens=False)


def test_end_and_padding_tokens_come_from_the_first_file_that_names_them(folder: Path) -> None:
    endoftext, im_start, im_end = range(3)
    _configure(folder, "config.json", eos_token_id=endoftext)
    _configure(folder)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (endoftext, endoftext)
    _configure(folder, "generation_config.json", eos_token_id=[im_start, im_end])
    assert load_tokenizer(folder).eos_id == im_start
    _configure(folder, "special_tokens_map.json", eos_token={"content": "<|im_end|>"})
    assert load_tokenizer(folder).eos_id == im_end
    _configure(folder, eos_token="<|endoftext|>", pad_token="<|im_start|>")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (endoftext, im_start)


def test_a_text_ends_where_generate_of_transformers_ends_it_and_a_reply_where_the_template_does(folder: Path) -> None:
    endoftext, im_start, im_end = range(3)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    _configure(folder, **{**config, "eos_token": "<|endoftext|>"})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.end_ids, tokenizer.reply_end_ids) == ({endoftext}, {endoftext, im_end})
    _configure(folder, "config.json", eos_token_id=5)
    assert load_tokenizer(folder).end_ids == {endoftext, 5}
    _configure(folder, "generation_config.json", eos_token_id=[im_start, 6])
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.end_ids, tokenizer.reply_end_ids) == ({endoftext, im_start, 6}, {endoftext, im_start, 6, im_end})
    plain = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    _configure(folder, **{**config, "eos_token": "<|endoftext|>", "chat_template": plain})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.reply_end_ids == tokenizer.end_ids, "a template that ends replies with no token"


def test_saved_folder_is_the_loaded_one(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("x", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "new" / "copy")
    tokenizer.save(folder)
    saved = sorted(file.name for file in (tmp_path / "new" / "copy").iterdir())
    assert saved == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in saved:
        assert (tmp_path / "new" / "copy" / name).read_bytes() == (folder / name).read_bytes()


def test_errors_say_what_was_looked_for(folder: Path, tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(ModelError) as raised:
            load_tokenizer(folder)
        return str(raised.value)

    _configure(folder)
    assert "names no end token: looked for eos_token in tokenizer_config.json" in message()
    _configure(folder, eos_token="<|nowhere|>")
    assert "eos_token '<|nowhere|>' is not in tokenizer.json" in message()
    (folder / "tokenizer_config.json").write_text("{", encoding="utf-8")
    assert "tokenizer_config.json is not valid JSON" in message()
    (folder / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    assert "tokenizer_config.json holds a list, not an object" in message()
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "tokenizer.json cannot be read as a tokenizer" in message()
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in message()
    with pytest.raises(ModelError, match="is not a folder"):
        load_tokenizer(tmp_path / "nowhere")
