"""The error line for one of torchtune's words on our command line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import yaml
from omegaconf import OmegaConf

from tuner.config.torchtune.answers import Answer
from tuner.config.torchtune.keys import answer

PLAIN = re.compile(r"[\w./:@%+ -]+")


def sentence_for(word: str, is_ours: Callable[[str], bool] = lambda key: True) -> str | None:
    """What to say in place of a word, None where it is none of torchtune's or the very word of ours.

    Args:
        word: `dtype=bf16`, a plus before it or not.
        is_ours: whether the command has this key or group of ours at its top level.
    """
    key, equals, text = word.lstrip("+").partition("=")
    found = answer(key, value_of(text)) if equals else None
    if found is None or not all(is_ours(ours.partition(".")[0]) for ours, _ in found.words):
        return None
    if as_said(found) == word or not (found.words or found.note):
        return None
    return f"{word}: {said(found)}"


def said(found: Answer) -> str:
    """An answer in words: `torchtune's; here precision=bf16`."""
    note = f" ({found.note})" if found.note else ""
    if found.words:
        return f"torchtune's name; say {as_said(found)}{note}"
    if found.lost:
        return f"torchtune's name; no such key here: {found.note}"
    return f"torchtune's name; leave it out: {found.note}"


def as_said(found: Answer) -> str:
    """The words of an answer as a shell takes them."""
    return " ".join(shlex.quote(rendered(key, value)) for key, value in found.words)


def rendered(key: str, value: Any) -> str:
    """`key=value` in Hydra's grammar."""
    return f"{key}={_text(value)}"


def value_of(text: str) -> Any:
    """The value that a word's text has in a YAML; text that is no YAML stays text."""
    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]  # type: ignore[call-overload, index]
    except (yaml.YAMLError, ValueError):
        return text


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = str(value)
    return text if PLAIN.fullmatch(text) or "," in text or text.startswith("${") else json.dumps(text)
