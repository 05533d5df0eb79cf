"""Packaged tokenizers of 512 tokens in the manner of Llama 3, Qwen and SmolLM2: byte-level BPE, a `tokenizer.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.tokenizers.merges import merges
from tuner.tokenizers.small_templates import LLAMA3
from tuner.tokenizers.steps import LLAMA3_PATTERN, QWEN_PATTERN
from tuner.tokenizers.tiny import CHATML

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

NUM_BYTES = 256


@dataclass(frozen=True)
class ByteLevel:
    """What a family's tokenizer is.

    Attributes:
        special: its special tokens, which have the last ids, as in the families' own.
        bos, eos, pad: three of these; None where the family names none.
        template: its chat template.
        split: the pattern that a text is split with; None splits off every digit and then as GPT-2.
        composes: text is brought to NFC first.
        whole_words: a word that is a token is taken as it is, whether or not merges lead to it.
        begins: a text begins with `bos` where special tokens are asked for.
    """

    special: tuple[str, ...]
    eos: str
    template: str
    bos: str | None = None
    pad: str | None = None
    split: str | None = None
    composes: bool = False
    whole_words: bool = False
    begins: bool = False


CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

BYTE_LEVEL = {
    "llama3": ByteLevel(
        LLAMA3_TOKENS, "<|eot_id|>", LLAMA3, "<|begin_of_text|>", split=LLAMA3_PATTERN, whole_words=True, begins=True
    ),
    "qwen": ByteLevel(CHATML_TOKENS, "<|im_end|>", CHATML, pad="<|endoftext|>", split=QWEN_PATTERN, composes=True),
    "smollm2": ByteLevel(CHATML_TOKENS, "<|im_end|>", CHATML, "<|im_start|>", "<|im_end|>"),
}


def write_byte_level(kind: str, size: int, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`, the same bytes each time.

    Args:
        kind: a key of `BYTE_LEVEL`.
        size: tokens it has.
        folder: made if it is not there.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    family = BYTE_LEVEL[kind]
    pairs = merges(size - NUM_BYTES - len(family.special))
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in pairs), *family.special]
    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=family.whole_words))
    if family.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(family)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    if family.begins and family.bos is not None:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, vocabulary[family.bos])]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.pad}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: token for role, token in named.items() if token is not None},
        "clean_up_tokenization_spaces": False,
        "chat_template": family.template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _pre_tokenizer(family: ByteLevel) -> PreTokenizer:
    from tokenizers import Regex, pre_tokenizers

    if family.split is None:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(family.split), behavior="isolated"), bytes_of])
