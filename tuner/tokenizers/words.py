"""Texts encoded word by word: what a word has been encoded to is kept, and looking it up takes a tenth of the time.

Most words of a data set have been met in another row, and most of what a template writes in all of them. A word that is
new is encoded by the `tokenizers` library, which also says where each of its tokens ends, so no rule of a vocabulary is
repeated here. Given up: tokenizers whose words depend on each other, as sentencepiece's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from threading import Lock

from tokenizers import Tokenizer as FastTokenizer

from tuner.tokenizers.added_tokens import Encoded, any_of

WORD = re.compile(
    r"\s*+(?:"
    r"[^\sA-Za-z]++(?:[^\S \t]\s*+)?+"  # marks and digits, with a line end behind them and what follows it
    r"|[A-Za-z]++(?=[^\x00-\x7f])"  # letters that others follow
    r")*+[A-Za-z]*+"
)
"""A text is cut behind ASCII letters that ASCII follows, and before a blank behind what is no space: see `steps`."""

ROOM = 1 << 20
"""Characters of the words that are kept: about 100,000 words in 50 MB. When they are more, all are forgotten."""


class Words:
    """The words that were met so far; several threads may use them.

    Args:
        tokenizer: one of which `steps.words_are_apart` is true.
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer, self._lock = tokenizer, Lock()
        # The library looks for these before it does anything else, and encodes what is between them by itself
        self._whole = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self._added = re.compile(f"({any_of(self._whole).pattern})")
        self._forget()

    def _forget(self) -> None:
        self._ids: dict[str, list[int]] = {}
        self._steps: dict[str, list[int]] = {}  # in characters, from where the token before ends to where each does
        self._composed: set[str] = set()  # words whose last token is said to end before they do
        self._room = ROOM

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """What the tokenizer gives for each text, without special tokens around it."""
        with self._lock:
            parted = self._words_of(texts)
            self._learn(list(set().union(*parted) - self._ids.keys()))
            encoded = [Encoded(_joined(self._ids, words), self._ends(words)) for words in parted]
            if self._room < 0:
                self._forget()
            return encoded

    def _ends(self, words: Sequence[str]) -> list[int]:
        if self._composed.isdisjoint(words):
            return list(accumulate(_joined(self._steps, words)))
        starts = accumulate(map(len, words[:-1]), initial=0)
        return [start + end for start, word in zip(starts, words, strict=True) for end in accumulate(self._steps[word])]

    def _words_of(self, texts: Sequence[str]) -> list[list[str]]:
        """Added tokens and words; what stands between added tokens in several texts, as a system message, is one."""
        parted = [self._added.split(text) for text in texts]
        again = (part for part, times in Counter(chain.from_iterable(parted)).items() if times > 1)
        whole = self._whole.union(again)
        return [
            [word for part in parts for word in ((part,) if part in whole else WORD.findall(part))] for parts in parted
        ]

    def _learn(self, words: Sequence[str]) -> None:
        for word, encoding in zip(words, self._tokenizer.encode_batch(words, add_special_tokens=False), strict=True):
            ends = [end for _, end in encoding.offsets]
            self._ids[word] = encoding.ids
            self._steps[word] = [end - before for before, end in zip([0, *ends], ends, strict=False)]
            if max(ends, default=0) < len(word):
                self._composed.add(word)
            self._room -= len(word)


def _joined(found: Mapping[str, list[int]], words: Sequence[str]) -> list[int]:
    return list(chain.from_iterable(map(found.__getitem__, words)))
