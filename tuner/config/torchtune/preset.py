"""What a torchtune YAML says in our words: settings, and a sentence for all that is no setting."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import yaml

GROUPS = ("model", "data", "quantization", "precision", "peft", "optimizer", "schedule", "logger")


SETTLED = ("out", "peft", "train.epochs", "train.max_steps")
"""Keys that several of torchtune's decide together."""


@dataclass(frozen=True)
class Setting:
    """A value of ours.

    Attributes:
        value: what the key is set to.
        origin: which key of torchtune's says so, or that torchtune means it where nothing is said.
    """

    value: Any
    origin: str


@dataclass
class Preset:
    """What a YAML says in our words.

    Attributes:
        settings: by our key; a group's name is a key, and its value the option.
        listed: what has no counterpart or wants a hand, a sentence each.
        held: what is so here whatever is said, a sentence each.
        needed: words of the command that runs it, since what they name is not here yet.
        trusted: words of every command, since a file is not to say whose code is run.
    """

    settings: dict[str, Setting] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    needed: list[str] = field(default_factory=list)
    trusted: list[str] = field(default_factory=list)

    def value(self, key: str) -> Any:
        found = self.settings.get(key)
        return None if found is None else found.value

    def put(self, key: str, value: Any, origin: str) -> None:
        """Set a key; of two keys of torchtune's that say it the later is taken, and a different value is listed."""
        before = self.settings.get(key)
        if before is not None and before.value != value and key not in SETTLED:
            self.listed.append(f"{before.origin} -- {origin} is taken")
        elif before is not None:
            origin = f"{before.origin}; {origin}"
        self.settings[key] = Setting(value, origin)

    def default(self, key: str, value: Any, origin: str) -> None:
        """Set a key that no key of torchtune's set."""
        self.settings.setdefault(key, Setting(value, origin))


def plain(value: Any) -> str:
    """A value as one line of YAML, whatever it holds: a second line would be lines of the preset."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if text.isprintable() else json.dumps(value, default=str)
