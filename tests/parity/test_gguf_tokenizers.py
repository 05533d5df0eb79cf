"""Tokenizers in GGUF files: the ids of the tokenizer they were made of, and of transformers reading the file."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import GGUFWriter

import tuner
from tuner.errors import ModelError
from tuner.models.gguf import read_gguf
from tuner.models.gguf_tokenizer import write_tokenizer

CORPUS = [
    "The capital of France is Paris, which lies on the Seine. In 1889 the Eiffel Tower opened for the World's Fair.",
    "def merge(left, right):\n    result = []\n    while left and right:\n        result.append(left.pop(0))\n",
    "I'll say we've done it; they'd say I'm late, and it's what you're after: 3.14159, 2.71828, 1000000.",
    "naïve café, déjà vu, Straße; the the the with with with of of of and and and in in in",
] * 3
TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "\n\n\n",
    "   leading, trailing   ",
    "tabs\tand\r\nline ends\r",
    "1234567890 12,345.67 0x1F 1e-10 v2.0.1",
    "isn't it's I'll we've they'd I'm you're DON'T",
    "日本語のテキスト 한국어 עברית العربية ไทย हिन्दी",
    "👩‍👩‍👧‍👦 flags 🇫🇷🇯🇵 skin 👍🏽",
    "zero\u200bwidth, no\u00a0break, \ufeffmark",
    "<|im_start|>system\nx<|im_end|>\n <|im_end|>glued<|im_start|><think>a</think>",
    "a" * 100,
    "∑ᵢ xᵢ² ≤ ∞ → ℝⁿ; α β γ",
]
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
ADDED = {"<|end|>": CONTROL, "<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER_DEFINED}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
Write = Callable[[GGUFWriter], None]


def read(folder: Path, architecture: str, write: Write) -> Path:
    """A GGUF file of a tokenizer alone in `folder/gguf`, and what it is converted to in `folder`."""
    file = folder / "gguf" / "model.gguf"
    file.parent.mkdir()
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(77)
    write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_tokenizer(folder, read_gguf(file).meta)
    return folder


@pytest.fixture(scope="module")
def bpe() -> dict[str, Any]:
    """Vocabulary and merges of a small byte-level tokenizer whose words are all split by spaces alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def bpe_keys(bpe: dict[str, Any], pre: str) -> Write:
    tokens = [*sorted(bpe["vocab"], key=bpe["vocab"].get), *ADDED, "[PAD404]"]
    types = [1] * len(bpe["vocab"]) + [*ADDED.values(), UNUSED]

    def write(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
        writer.add_bos_token_id(tokens.index("<|im_start|>"))
        writer.add_eos_token_id(tokens.index("<|im_end|>"))
        writer.add_chat_template(TEMPLATE)

    return write


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm"])
def test_byte_level_ids_are_those_of_transformers_reading_the_file(
    pre: str, bpe: dict[str, Any], tmp_path: Path
) -> None:
    """But for what such a file does not say and the published tokenizers do: see the next two tests."""
    from transformers import AutoTokenizer

    read(tmp_path, "llama", bpe_keys(bpe, pre))
    found, theirs = (
        tuner.load_tokenizer(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf"),
    )
    plainly = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False)
        if pre == "smollm":  # whose digits transformers leaves together
            assert found.decode(found.encode(text, control_tokens=True)) == text
        else:
            assert found.encode(text, control_tokens=True) == expected, text
        assert plainly.encode(text, add_special_tokens=False) == found.encode(text, control_tokens=True)
        assert plainly.encode(text, add_special_tokens=False, split_special_tokens=True) == found.encode(text)
        assert found.decode(found.encode(text)) == text
    assert found.eos_id == theirs.eos_token_id == plainly.eos_token_id == len(bpe["vocab"]) + 2
    assert found.vocab_size == len(bpe["vocab"]) + len(ADDED)  # and no placeholder
    assert found.render_chat([{"role": "user", "content": "x"}]) == "x"  # type: ignore[list-item]


def test_qwen2_is_transformers_own_class(bpe: dict[str, Any], tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    found = tuner.load_tokenizer(read(tmp_path, "qwen2", bpe_keys(bpe, "qwen2")))
    theirs = Qwen2Tokenizer(vocab=bpe["vocab"], merges=bpe["merges"])
    composed = "e\u0301 and \u00e9"
    for text in [*TEXTS, composed]:
        if "<" not in text:
            assert found.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert found.encode("e\u0301") == found.encode("\u00e9")  # NFC, which the file does not say


def test_llama3_begins_a_text_and_takes_whole_words(bpe: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    unreachable = {**bpe, "vocab": {**bpe["vocab"], "Seinezq": len(bpe["vocab"])}}
    read(tmp_path, "llama", bpe_keys(unreachable, "llama-bpe"))
    found, theirs = tuner.load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert found.encode("Seinezq") == [len(bpe["vocab"])]
    bos = len(bpe["vocab"]) + 2
    assert theirs.encode("The") == [bos, *found.encode("The")]
    assert theirs.bos_token_id == bos


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    """A small sentencepiece tokenizer with the settings of Llama 2's."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=content,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())


def type_of(pieces: sentencepiece.SentencePieceProcessor, id_: int) -> int:
    if pieces.is_unknown(id_):
        return 2
    return CONTROL if pieces.is_control(id_) else 6 if pieces.is_byte(id_) else 1


def piece_keys(pieces: sentencepiece.SentencePieceProcessor, *, prefix: bool) -> Write:
    """As llama.cpp's converter: spaces in tokens that were added are spaces."""
    size = pieces.get_piece_size()
    added = {"<|end|>": CONTROL, "<think>": USER_DEFINED, "    ": USER_DEFINED, "[PAD403]": UNUSED}

    def write(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([*(pieces.id_to_piece(id_) for id_ in range(size)), *added])
        writer.add_token_scores([*(pieces.get_score(id_) for id_ in range(size)), *[-1000.0] * len(added)])
        writer.add_token_types([*(type_of(pieces, id_) for id_ in range(size)), *added.values()])
        writer.add_bos_token_id(pieces.bos_id())
        writer.add_eos_token_id(pieces.eos_id())
        writer.add_unk_token_id(pieces.unk_id())
        writer.add_add_space_prefix(prefix)

    return write


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_model_is_the_original(
    prefix: bool, pieces: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    """By sentencepiece itself; without the space that begins a text where the file says so, as Gemma's does."""
    folder = read(tmp_path, "llama", piece_keys(pieces, prefix=prefix))
    found = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert found.get_piece_size() == pieces.get_piece_size() + 4
    assert (found.bos_id(), found.eos_id(), found.unk_id(), found.pad_id()) == (1, 2, 0, -1)
    for text in TEXTS:
        if "<think>" not in text and "   " not in text:
            expected = pieces.encode(text)
            if not prefix and text and not text.startswith(" "):
                assert found.encode(f" {text}") == expected, text
            else:
                assert found.encode(text) == expected or not prefix, text
            assert found.decode(found.encode(text)) == text
    assert found.encode("a<think>    b")[-3:-1] == [pieces.get_piece_size() + 1, pieces.get_piece_size() + 2]


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_sentencepiece_ids_are_those_of_transformers_reading_the_file(
    architecture: str, pieces: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = read(tmp_path, architecture, piece_keys(pieces, prefix=architecture == "llama"))
    found, size = AutoTokenizer.from_pretrained(folder), pieces.get_piece_size()
    ours = tuner.load_tokenizer(folder)
    for text in TEXTS:
        if "    " not in text:
            assert ours.encode(text, control_tokens=True, add_special_tokens=True) == found.encode(text), text
    assert ours.encode("a    b")[-2] == size + 2 != found.encode("a    b")[-2]  # which it adds again, behind all others
    assert (found.bos_token_id, found.eos_token_id, found.unk_token_id) == (1, 2, 0)
    if architecture == "llama":
        theirs = AutoTokenizer.from_pretrained(folder / "gguf", gguf_file="model.gguf")
        assert found.encode("The capital") == theirs.encode("The capital")
        assert found.encode("The capital")[0] == 1
        for text in TEXTS:
            if "    " not in text:
                assert found.encode(text) == theirs.encode(text), text
    assert found.convert_tokens_to_ids(["<|end|>", "<think>"]) == [size, size + 1]
    ids = found.encode("Paris<think>Seine<|end|>", add_special_tokens=False)
    assert ids[-1] == size
    assert size + 1 in ids


def refusal(folder: Path, write: Write) -> str:
    shutil.rmtree(folder / "gguf", ignore_errors=True)
    with pytest.raises(ModelError) as caught:
        read(folder, "llama", write)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "pre"), [("bert", None), ("t5", None), ("gpt2", "falcon"), ("gpt2", None)])
def test_a_tokenizer_that_is_not_known_is_refused_by_name(kind: str, pre: str | None, tmp_path: Path) -> None:
    def write(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(kind)
        if pre is not None:
            writer.add_tokenizer_pre(pre)

    said = refusal(tmp_path, write)
    assert (
        f"GGUF tokenizer {f'{kind}/{pre}' if kind == 'gpt2' else kind} is not supported; valid: llama, gpt2/ll" in said
    )


def test_what_a_tokenizer_lacks_is_named(bpe: dict[str, Any], tmp_path: Path) -> None:
    assert "GGUF tokenizer None is not supported" in refusal(tmp_path, lambda writer: None)

    def no_merges(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(["a"])
        writer.add_token_types([1])

    assert refusal(tmp_path, no_merges) == "lacks tokenizer.ggml.merges, tokenizer.ggml.eos_token_id"

    def no_unknown(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["a"])
        writer.add_token_scores([0.0])
        writer.add_token_types([1])

    assert "token_type has 0 unknown tokens, sentencepiece needs one" in refusal(tmp_path, no_unknown)

    def no_such_token(writer: GGUFWriter) -> None:
        bpe_keys(bpe, "qwen2")(writer)
        writer.add_pad_token_id(405)

    assert refusal(tmp_path, no_such_token) == "tokenizer.ggml.padding_token_id is none of 405 tokens"
    wrong = {**bpe, "merges": [("no", "such")]}
    assert "tokenizer.ggml.merges do not fit tokenizer.ggml.tokens" in refusal(tmp_path, bpe_keys(wrong, "qwen2"))
