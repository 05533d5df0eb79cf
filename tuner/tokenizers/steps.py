"""What a `tokenizer.json` declares of the steps from a text to its tokens.

A byte-level tokenizer splits a text by a pattern and merges nothing across a split. The patterns known here all split

- behind an ASCII letter that a space follows or ASCII that is no letter: what matches a letter goes on with letters;
- behind what is no space where a blank follows: what matches the one may go on with line ends, not with a blank.

No match depends on what is before it, and of what is behind it only one of nothing but spaces does. So what is between
two such places has the same tokens in a text and by itself. Digits that are split off before change nothing of it, and
NFC never composes an ASCII character with what is before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
"""It differs from Llama 3's in that no two digits stand together."""

Step = Mapping[str, Any]

GPT2_SPLIT: Step = {"type": "ByteLevel", "use_regex": True}
SPLITS: Sequence[Step] = [
    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    for pattern in (LLAMA3_PATTERN, QWEN_PATTERN)
]
DIGITS: Step = {"type": "Digits"}
BYTES: Step = {"type": "ByteLevel", "add_prefix_space": False}
COMPOSING: Step = {"type": "NFC"}
LEAVING_ENDS: Sequence[Step] = [{"type": "ByteLevel", "trim_offsets": False}, {"type": "TemplateProcessing"}]
"""Of what happens to tokens: where they end is not changed."""


def parts_of(step: Step | None, inner: str) -> list[dict[str, Any]]:
    """Copies of a step's parts, all the way down; `inner` is where a sequence of such steps has them."""
    if step is None:
        return []
    return [found for part in step[inner] for found in parts_of(part, inner)] if inner in step else [dict(step)]


def words_are_apart(tokenizer: FastTokenizer) -> bool:
    """Whether texts that are cut in these places have the tokens of their pieces."""
    normalizers = parts_of(_declared(tokenizer.normalizer), "normalizers")
    *first, last = parts_of(_declared(tokenizer.pre_tokenizer), "pretokenizers") or [{}]
    behind = parts_of(_declared(tokenizer.post_processor), "processors")
    return (
        isinstance(tokenizer.model, BPE)
        and not tokenizer.model.dropout
        and all(_is_one_of(step, [COMPOSING]) for step in normalizers)
        and all(_is_one_of(step, [*SPLITS, DIGITS]) for step in first)
        and _is_one_of(last, [BYTES])
        and any(_is_one_of(step, [*SPLITS, GPT2_SPLIT]) for step in [*first, last])
        and all(_is_one_of(step, LEAVING_ENDS) for step in behind)
        and all(_is_found_first(token) for token in tokenizer.get_added_tokens_decoder().values())
    )


def _declared(step: Any) -> Step | None:
    """A step as `tokenizer.json` has it; writing all of that down takes long with a large vocabulary."""
    return None if step is None else json.loads(step.__getstate__())


def _is_one_of(step: Step, known: Sequence[Step]) -> bool:
    return any(one.items() <= step.items() for one in known)


def _is_found_first(token: Any) -> bool:
    """Whether an added token is found before anything else happens to the text, wherever its content stands."""
    return not (token.normalized or token.lstrip or token.rstrip or token.single_word)
