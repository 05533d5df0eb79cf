"""What is answered to one of torchtune's keys with a value: the words to say here, or why there is nothing to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What takes the place of one of torchtune's keys.

    Attributes:
        words: keys of ours with their values; a group's name is a key, and its value the option.
        note: what is to be known beside the words, or in their place.
        lost: something of it has no counterpart and has to be told to the person.
    """

    words: tuple[tuple[str, Any], ...] = ()
    note: str = ""
    lost: bool = False


Reading = Callable[[Any], Answer]
"""From a value to what it means here."""


def same(key: str) -> Reading:
    """The value carries over to `key` of ours; null leaves what is set here."""

    def read(value: Any) -> Answer:
        return Answer(note="null there: the default here") if value is None else Answer(((key, value),))

    return read


def holds(note: str) -> Reading:
    """Nothing is to be said: it is so here whatever the value is."""
    return lambda value: Answer(note=note)


def absent(note: str) -> Reading:
    """No counterpart, unless the value is null or false, which asks for nothing."""

    def read(value: Any) -> Answer:
        return Answer(note="off here too") if value in (None, False) else Answer(note=note, lost=True)

    return read


def chosen(key: str, options: Mapping[Any, Any], note: str) -> Reading:
    """The value's option of `key`; of other values `note` says why they have none."""

    def read(value: Any) -> Answer:
        is_known = isinstance(value, str | bool) and value in options
        return Answer(((key, options[value]),)) if is_known else Answer(note=note, lost=True)

    return read


def only(values: tuple[Any, ...], note: str, otherwise: str) -> Reading:
    """`note` for the values which are so here anyway, and `otherwise` for those without a counterpart."""
    return lambda value: Answer(note=note) if value in values else Answer(note=otherwise, lost=True)
