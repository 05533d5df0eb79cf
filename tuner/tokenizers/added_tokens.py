"""Tokens that stand beside a vocabulary and are found in a text before it is tokenized.

The rules are those of the `tokenizers` library (`added_vocabulary.rs`): of tokens that begin at one place the longest,
from left to right; `single_word` ones not within a word; `lstrip` and `rstrip` ones swallow the spaces on that side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

_SPACE = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
"""Unicode's White_Space. Python's `\\s` has four control characters more."""

_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class AddedToken:
    """One of them.

    Attributes:
        content: its text.
        id: its id.
        special: left out by `decode(skip_special_tokens=True)`.
        control: written by a template only; the same text in a message is ordinary text.
        lstrip: the spaces before it belong to it.
        rstrip: the spaces behind it do.
        single_word: it is one only where no letter, digit or underscore touches it.
    """

    content: str
    id: int
    special: bool = True
    control: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class MarkedText:
    """A text to encode.

    Attributes:
        text: all of it.
        plain: from where to where, in characters, no control token is: its spelling there is ordinary text. In order.
    """

    text: str
    plain: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """An encoded text.

    Attributes:
        ids: its tokens.
        ends: behind which character of the text each ends, never falling.
    """

    ids: list[int]
    ends: list[int]


Behind = Literal["nothing", "token", "text"]


@dataclass(frozen=True)
class Run:
    """A piece of a text: one added token, or what stands between two.

    Attributes:
        start: its first character.
        stop: behind its last.
        id: of the token, None for text.
        behind: what is before it: nothing, an added token, or text that is encoded by itself.
    """

    start: int
    stop: int
    id: int | None = None
    behind: Behind = "nothing"

    def letters(self) -> list[Run]:
        """A run for each of its characters."""
        rest = [Run(k, k + 1, behind="text") for k in range(self.start + 1, self.stop)]
        return [Run(self.start, self.start + 1, behind=self.behind), *rest]


class AddedTokens:
    """All of them.

    Args:
        tokens: in any order; of several with one content the last one counts.
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.tokens = {token.content: token for token in tokens if token.content}
        self.control = [token.content for token in self.tokens.values() if token.control]
        self.control_ids = {token.id for token in self.tokens.values() if token.control}
        self.special_ids = {token.id for token in self.tokens.values() if token.special}
        self._swallow = {token.id for token in self.tokens.values() if token.rstrip}
        self._any, self._control = any_of(self.tokens), any_of(self.control)

    def has_control(self, text: str) -> bool:
        """Whether a control token's text occurs."""
        return self._control.search(text) is not None

    def ends(self, text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
        """Behind which character each token ends, the spaces that one swallows not counted.

        Args:
            text: all of it.
            ids: its tokens.
            spans: where each stands, such spaces included.
        """
        if self._swallow.isdisjoint(ids):
            return [stop for _, stop in spans]
        bare = (start + len(text[start:stop].rstrip()) for start, stop in spans)
        return [end if id_ in self._swallow else stop for id_, end, (_, stop) in zip(ids, bare, spans, strict=True)]

    def split(self, marked: MarkedText, *, only_control: bool = False) -> list[Run]:
        """A text as its added tokens and what is between them, in order and without gaps.

        Args:
            marked: the text. Its plain parts are runs of their own, or several where other added tokens are in them.
            only_control: leave the others to whatever reads the text in between.
        """
        parts, at = [], 0
        for start, stop in marked.plain:
            parts += [(at, start, False), (start, stop, True)]
            at = stop
        runs: list[Run] = []
        for start, stop, plain in [*parts, (at, len(marked.text), False)]:
            for run in self._split_part(marked.text, start, stop, only_control=only_control, plain=plain):
                behind: Behind = "nothing" if not runs else "text" if runs[-1].id is None else "token"
                runs.append(replace(run, behind=behind))
        return runs

    def _split_part(self, text: str, at: int, stop: int, *, only_control: bool, plain: bool) -> Iterator[Run]:
        part, done = text[at:stop], 0
        for match in (self._control if only_control else self._any).finditer(part):
            token = self.tokens[match.group()]
            if match.start() < done or (token.control and plain) or not _stands_alone(token, part, *match.span()):
                continue
            first, last = _with_spaces(token, part, *match.span())
            first = max(first, done)
            if done < first:
                yield Run(at + done, at + first)
            yield Run(at + first, at + last, token.id)
            done = last
        if done < len(part):
            yield Run(at + done, stop)


def any_of(contents: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of them, the longest first; of none it never matches."""
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _stands_alone(token: AddedToken, text: str, start: int, stop: int) -> bool:
    """Whether neither side of a `single_word` token is part of a word."""
    sides = (text[k] for k in (start - 1, stop) if 0 <= k < len(text))
    return not (token.single_word and any(map(_WORD.match, sides)))


def _with_spaces(token: AddedToken, text: str, start: int, stop: int) -> tuple[int, int]:
    """From where to where the token stands with the spaces that belong to it."""
    while token.lstrip and start > 0 and _SPACE.match(text, start - 1):
        start -= 1
    while token.rstrip and _SPACE.match(text, stop):
        stop += 1
    return start, stop
