"""Small tokenizers of each kind that a `tokenizer.model` can be, in folders as the models' publishers lay them out."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

CORPUS = [
    "The capital of France is Paris, which lies on the Seine. In 1889 the Eiffel Tower opened for the World's Fair.",
    "def merge(left, right):\n    result = []\n    while left and right:\n        result.append(left.pop(0))\n",
    "I'll say we've done it; they'd say I'm late, and it's what you're after: 3.14159, 2.71828, 1000000.",
    "naïve café, déjà vu, Straße; the the the with with with of of of and and and in in in </s> <s> <end_of_turn> end",
] * 3

LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
GEMMA = {
    **{"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "tokenizer_class": "GemmaTokenizer",
}
PHI3_ADDED = {
    "<|endoftext|>": {"special": True},
    "<|assistant|>": {"special": True, "rstrip": True},
    "<placeholder>": {"special": False, "single_word": True},
    "<|end|>": {"special": True, "rstrip": True},
    "<|user|>": {"special": True, "rstrip": True, "lstrip": True},
    "<think>": {"special": False},
}


def sentencepiece_model(**settings: Any) -> bytes:
    """A small model with the settings of Llama 2's but for those given."""
    content = io.BytesIO()
    published: dict[str, Any] = {
        **{"model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "normalization_rule_name": "identity"},
        **{"remove_extra_whitespaces": False, "split_digits": True, "character_coverage": 1.0, "minloglevel": 2},
        "allow_whitespace_only_pieces": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=content, **{**published, **settings}
    )
    return content.getvalue()


def gemma_model() -> bytes:
    """No space before a text, other ids, and pieces that stand for themselves."""
    named = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "bos_piece": "<bos>", "eos_piece": "<eos>"}
    own = ["<start_of_turn>", "<end_of_turn>", "\n\n", "<table>"]
    return sentencepiece_model(add_dummy_prefix=False, user_defined_symbols=own, **named)


def list_of_tokens() -> bytes:
    """As Llama 3's: the bytes and what is merged of them, in the order of ranks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    letters = {letter: byte for byte, letter in enumerate(_letters())}
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    spelt = [bytes(letters[letter] for letter in word) for word in words]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(spelt))


def _letters() -> list[str]:
    """The letter of each byte, as byte-level pre-tokenizers write it: found by asking one."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    shown = {byte: split.pre_tokenize_str(chr(byte))[0][0] for byte in range(0x80)}
    for lead in range(0x80, 0x110000):
        if len(shown) == 243:  # all that occur in UTF-8
            break
        if not 0xD800 <= lead < 0xE000 and lead % 64 in range(64):
            shown.update(zip(chr(lead).encode(), split.pre_tokenize_str(chr(lead))[0][0], strict=True))
    rest = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(shown.values()))
    unused = [byte for byte in range(256) if byte not in shown]
    return [shown[byte] if byte in shown else rest[unused.index(byte)] for byte in range(256)]


def write_folder(folder: Path, model: bytes, settings: dict[str, Any] | None = None, **files: Any) -> Path:
    """`tokenizer.model`, `tokenizer_config.json` if there is one, and further JSON files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in {**files, **({} if settings is None else {"tokenizer_config": settings})}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def phi3_added(first_id: int) -> dict[str, Any]:
    """`added_tokens_decoder` of Phi-3: behind the model's own pieces."""
    plain = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    tokens = enumerate(PHI3_ADDED.items(), first_id)
    return {str(id_): {"content": content, **plain, **sides} for id_, (content, sides) in tokens}
