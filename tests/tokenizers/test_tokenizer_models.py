"""Folders with a `tokenizer.model`: which file is read, what is refused, what is saved."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tuner.errors import ModelError
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.tiktoken import LLAMA3, LLAMA3_1
from tuner.tokenizers.tiny import write_tiny_tokenizer

WORDS = ["the small words of a tokenizer", "and some other words: naïve, 日本"]
BYTES = [bytes([byte]) for byte in range(256)]
TEXT = "the words, 日本 </s><|eot_id|> 👋"


def list_of_tokens(tokens: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


@pytest.fixture(scope="module")
def pieces() -> dict[str, bytes]:
    """A model with Llama 2's settings, and one with sentencepiece's own."""
    found = {}
    for kind in ("bpe", "unigram"):
        content = io.BytesIO()
        words = iter(WORDS * 20)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=words,
            model_writer=content,
            model_type=kind,
            vocab_size=300,
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity" if kind == "bpe" else "nmt_nfkc",
            remove_extra_whitespaces=kind == "unigram",
            minloglevel=2,
        )
        found[kind] = content.getvalue()
    return found


def folder_with(folder: Path, content: bytes, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(content)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def test_tokenizer_json_is_read_where_both_are_there(pieces: dict[str, bytes], tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    expected = load_tokenizer(tmp_path).encode(TEXT)
    assert load_tokenizer(folder_with(tmp_path, pieces["bpe"])).encode(TEXT) == expected
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).encode(TEXT) != expected


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_are_sentencepieces_own(kind: str, pieces: dict[str, bytes], tmp_path: Path) -> None:
    """With the normalisation that a model asks for, NFKC and single spaces in the second one."""
    ours = load_tokenizer(folder_with(tmp_path, pieces[kind]))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=pieces[kind])
    texts = [" ", " the", "  the  words"] if kind == "unigram" else []  # bpe: as transformers, see tests/parity
    for text in (*texts, *WORDS, TEXT, "", "ﬁne ①  two ", "\x00", "the\nwords", "a" * 50, "words " * 300):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), text
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_id(), theirs.get_piece_size())
    expected = [*theirs.encode("the"), theirs.eos_id(), *theirs.encode("words")]  # with a space before the second word
    assert ours.encode("the</s> words", control_tokens=True) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "tokenizer.model is empty"),
        (b"\x00\x01 nothing", "tokenizer.model is neither a sentencepiece model nor a list of tokens for tiktoken"),
        (b"\n", "neither a sentencepiece model nor a list of tokens for tiktoken"),
        (b"[PAD]\n[UNK]\n", "neither a sentencepiece model nor a list of tokens for tiktoken"),
        (b"\x12\x00", "neither a sentencepiece model nor a list of tokens for tiktoken"),
        (list_of_tokens(BYTES) + b"IQ==\n", "tokenizer.model:257: not a token in base64 and its rank"),
        (list_of_tokens(BYTES) + b"YWE= 300\n", "tokenizer.model:257: rank 300; ranks count from 0"),
        (list_of_tokens([*BYTES, b"a"]), "tokenizer.model:257: rank 256; ranks count from 0 and each token has one"),
        (list_of_tokens(BYTES[:-2]), "2 of the 256 bytes are no tokens, 0xfe the first"),
    ],
)
def test_what_is_no_tokenizer_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as raised:
        load_tokenizer(folder_with(tmp_path, content))
    assert said in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_a_cut_file_is_refused(pieces: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a sentencepiece model nor"):
        load_tokenizer(folder_with(tmp_path, pieces["bpe"][:1000]))


def test_damaged_files_beside_it_are_named(pieces: dict[str, bytes], tmp_path: Path) -> None:
    for files, said in (
        ({"tokenizer_config": []}, "tokenizer_config.json holds a list"),
        ({"tokenizer_config": {"eos_token": "<|nowhere|>"}}, "eos_token '<|nowhere|>' is not in tokenizer.model"),
        (
            {"tokenizer_config": {"additional_special_tokens": ["<x>"]}},
            "tokenizer_config.json names '<x>', and no file",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {"a": {"content": "x"}}}}, "added_tokens_decoder"),
        ({"tokenizer_config": {"added_tokens_decoder": {"300": {"special": True}}}}, "added_tokens_decoder"),
        ({"tokenizer_config": {}, "added_tokens": {"x": "y"}}, "added_tokens.json"),
    ):
        with pytest.raises(ModelError) as raised:
            load_tokenizer(folder_with(tmp_path, pieces["bpe"], **files))
        assert said in str(raised.value)


def test_llama3_has_its_special_tokens_by_version(tmp_path: Path) -> None:
    assert len(LLAMA3) == len(set(LLAMA3)) == len(LLAMA3_1) == len(set(LLAMA3_1)) == 256
    assert LLAMA3.index("<|eot_id|>") == LLAMA3_1.index("<|eot_id|>") == 9
    assert (LLAMA3[-1], LLAMA3_1[-1]) == ("<|reserved_special_token_250|>", "<|reserved_special_token_247|>")
    content = list_of_tokens(BYTES)
    assert load_tokenizer(folder_with(tmp_path, content)).encode("<|eom_id|>", control_tokens=True) != [264]
    for config in ({"rope_scaling": {"rope_type": "llama3"}}, {"rope_parameters": {"rope_type": "llama3"}}):
        scaled = load_tokenizer(folder_with(tmp_path, content, config=config))
        assert scaled.encode("<|eom_id|>", control_tokens=True) == [264]
    assert (scaled.vocab_size, scaled.eos_id) == (512, 257)
    chat = load_tokenizer(folder_with(tmp_path, content, config={"eos_token_id": [265, 257]}))
    assert chat.eos_id == 265


def test_llama3s_added_tokens_are_those_that_the_folder_names(tmp_path: Path) -> None:
    def named(**tokens: str) -> dict[str, object]:
        return {"added_tokens_decoder": {id_[1:]: {"content": content} for id_, content in tokens.items()}}

    content = list_of_tokens(BYTES)
    known = load_tokenizer(folder_with(tmp_path, content, tokenizer_config=named(_265="<|my_end|>", _512="<extra>")))
    assert known.encode("<|my_end|><extra>", control_tokens=True) == [265, 512]
    for tokens in ({"_255": "<|x|>"}, {"_513": "<|x|>"}):
        with pytest.raises(ModelError, match=r"have to follow the 256 of tokenizer\.model without a gap"):
            load_tokenizer(folder_with(tmp_path, content, tokenizer_config=named(**tokens)))
    with pytest.raises(ModelError, match="lacks an id or a content"):
        load_tokenizer(folder_with(tmp_path, content, tokenizer_config={"added_tokens_decoder": {"x": {}}}))


def test_what_is_saved_transformers_reads_alike(pieces: dict[str, bytes], tmp_path: Path) -> None:
    llama2 = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    folders = [
        folder_with(tmp_path / "llama2", pieces["bpe"], tokenizer_config=llama2, added_tokens={"<|eot_id|>": 300}),
        folder_with(tmp_path / "llama3", list_of_tokens([*BYTES, b"th", b"the"]), config={"model_type": "llama"}),
    ]
    for folder in folders:
        tokenizer = load_tokenizer(folder)
        tokenizer.save(tmp_path / "saved" / folder.name)
        again = load_tokenizer(tmp_path / "saved" / folder.name)
        theirs = AutoTokenizer.from_pretrained(tmp_path / "saved" / folder.name)
        ids = tokenizer.encode(TEXT, control_tokens=True)
        assert ids == again.encode(TEXT, control_tokens=True) == theirs.encode(TEXT, add_special_tokens=False)
        assert tokenizer.encode(TEXT) == again.encode(TEXT)
        assert tokenizer.eos_id == again.eos_id == theirs.eos_token_id
    assert Tokenizer.from_file(str(tmp_path / "saved/llama3/tokenizer.json")).encode("the").ids == [258, 257]  # begun
    assert not (tmp_path / "llama3/tokenizer.json").exists()
