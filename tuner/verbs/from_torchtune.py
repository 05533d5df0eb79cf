"""`tuner cp`: with --from-torchtune, one of torchtune's YAMLs in our words; without, one of our config files."""

from __future__ import annotations

from tuner.config.torchtune.writing import translate
from tuner.errors import ConfigError
from tuner.verbs import cp

SWITCH = "--from-torchtune"


def copy_or_translate(*words: str) -> str:
    """Copy one of our config files, or translate one of torchtune's.

    Args:
        words: a name, or a file of torchtune's, and a destination; the switch anywhere among them.

    Raises:
        ConfigError: as `cp` and `translate`; words that are neither.
    """
    name, *dest = [word for word in words if word != SWITCH]
    if len(dest) != 1 or dest[0].startswith("-") or name.startswith("-"):
        raise ConfigError(f"cp takes NAME DEST, or {SWITCH} FILE DEST; given: {' '.join(words)}")
    return translate(name, dest[0]) if SWITCH in words else cp.cp(name, dest[0])
