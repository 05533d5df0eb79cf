"""The errors a person can cause, each one clear line.

The command line prints the message of a `TunerError` and exits with code 2, without a traceback (`HYDRA_FULL_ERROR=1`
shows it). Everything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TunerError(Exception):
    """Base of all errors whose cause is the input and not the program.

    Attributes:
        exit_code: what the command line ends with.
    """

    exit_code = 2


class ConfigError(TunerError):
    """One or more problems of a configuration, all found in one pass.

    Args:
        problems: one sentence each, naming the key, the value and the valid choices.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class UnknownKey(ConfigError):
    """A word names a key that what the other words choose does not have; elsewhere in a sweep it may exist.

    Args:
        problems: the sentence, or one for each such word.
        key: the key, dotted; the first of several.
    """

    def __init__(self, problems: str | Iterable[str], key: str) -> None:
        super().__init__(problems)
        self.key = key


class IllegalCombination(ConfigError):
    """Values that are right each by itself and cannot go together: a point of a sweep that is left out, not a typo.

    Args:
        problems: one sentence each.
        rules: the names of the broken rules, in the same order.
    """

    def __init__(self, problems: Iterable[str], rules: Iterable[str]) -> None:
        super().__init__(problems)
        self.rules = list(rules)


class DataError(TunerError):
    """A dataset that cannot be read, with the file and the line number where there is one."""


class ModelError(TunerError):
    """A model folder or weight file that cannot be loaded, or a model that cannot do what is asked of it."""


class CheckpointError(TunerError):
    """A checkpoint that cannot be written (no room) or read (damaged, or of another run)."""


class RunBusy(CheckpointError):
    """A run folder in which another process is at work."""


class TrainingError(TunerError):
    """A run whose numbers stopped making sense."""


class OutOfMemory(TunerError):
    """A run for which the device or its host has no memory left."""


class Interrupted(TunerError):
    """A run that was asked to stop and has saved its state."""

    exit_code = 130


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint of the form `did you mean a or b? valid: a, b, c`, the close matches first.

    Args:
        name: what was given.
        choices: every name that would have been valid.
    """
    valid = sorted(str(choice) for choice in choices)
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}valid: {', '.join(valid) or '(nothing)'}"
