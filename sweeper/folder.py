"""The sweep folder: `sweep.json` says what was asked for, one run folder a trial holds what came of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sweeper.plan import Trial
from tuner.errors import ConfigError

SWEEP = "sweep.json"


@dataclass(frozen=True)
class Entry:
    """A trial as `sweep.json` keeps it.

    Attributes:
        id, words, values: as of `plan.Trial`.
        illegal: why it cannot work, None where it can.
    """

    id: str
    words: list[str]
    values: dict[str, str]
    illegal: str | None


class SweepFolder:
    """Reads and writes a sweep folder.

    Args:
        path: absolute.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def out(self, trial_id: str) -> Path:
        """The run folder of a trial."""
        return self.path / trial_id

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and keep other sweeps out of it.

        Raises:
            ConfigError: it cannot be made or written, or another sweep runs in it.
        """
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"hydra.sweep.dir={self.path}: cannot be made: {error.strerror}") from error
        if not os.access(self.path, os.W_OK):
            raise ConfigError(f"hydra.sweep.dir={self.path}: no permission to write into it")
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"hydra.sweep.dir={self.path}: another sweep is running in it") from error
        try:
            yield
        finally:
            lock.release()

    def record(self, words: Sequence[str], objective: str, trials: Sequence[Trial]) -> list[Entry]:
        """Add what is asked for now to what was asked for before; returns all of it.

        Raises:
            ConfigError: the folder holds a sweep with another objective, whose trials could not be compared.
        """
        before = self.read()
        if before and before["objective"] != objective:
            raise ConfigError(
                f"hydra.sweep.dir={self.path} holds a sweep whose train.objective is {before['objective']}, not "
                f"{objective}; give another folder"
            )
        entries = {entry["id"]: entry for entry in before.get("trials", [])}
        for trial in trials:
            entries[trial.id] = asdict(Entry(trial.id, list(trial.words), dict(trial.values), trial.illegal))
        content = {"words": list(words), "objective": objective, "trials": list(entries.values())}
        unfinished = self.path / f".{SWEEP}"
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.path / SWEEP)
        return [Entry(**entry) for entry in entries.values()]

    def read(self) -> dict[str, Any]:
        """`sweep.json`, empty where there is none."""
        file = self.path / SWEEP
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise ConfigError(f"{file}: damaged: {error}; without it the sweep is planned anew") from error
        return content

    def entries(self) -> list[Entry]:
        """The trials of `sweep.json`.

        Raises:
            ConfigError: this is no sweep folder.
        """
        content = self.read()
        if not content:
            raise ConfigError(f"{self.path} is not a sweep folder: it has no {SWEEP}")
        return [Entry(**entry) for entry in content["trials"]]
