"""`python -m tuner ...` in a process whose hub is the stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.models.hub_server import HubServer

NOWHERE = "http://127.0.0.1:9"
"""An address at which nobody answers."""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@dataclass(frozen=True)
class Command:
    """Called with words, and variables of the environment that differ.

    Args:
        hub: who is asked.
        home: the cache of what is downloaded.
    """

    hub: HubServer
    home: Path

    def __call__(self, *words: str, **changed: str) -> Done:
        return self.python("-m", "tuner", *words, **changed)

    def python(self, *arguments: str, **changed: str) -> Done:
        """Python itself, likewise."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
        env = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        env |= {"HF_ENDPOINT": self.hub.address, "HF_HOME": str(self.home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env={**env, **changed}, capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)
