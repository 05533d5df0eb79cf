"""Several loggers as one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.types import Logger, RunInfo


class ManyLogger:
    """Hands everything to each of its loggers; none of them can hold another up, since none raises or waits.

    Args:
        loggers: members of the logger group under names of the user's choice.
    """

    def __init__(self, loggers: dict[str, Logger]) -> None:
        self.loggers = loggers

    def start(self, run: RunInfo) -> None:
        for logger in self.loggers.values():
            logger.start(run)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for logger in self.loggers.values():
            logger.log(step, metrics)

    def artifact(self, path: Path) -> None:
        for logger in self.loggers.values():
            logger.artifact(path)

    def close(self, status: str, summary: Mapping[str, Any]) -> dict[str, Any]:
        """The facts of all, and the sum of their waits at most."""
        facts: dict[str, Any] = {}
        for logger in self.loggers.values():
            facts.update(logger.close(status, summary))
        return facts
