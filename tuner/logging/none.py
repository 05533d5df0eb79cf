"""The logger that does nothing; terminal and run folder are written all the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.types import RunInfo


class NoLogger:
    """Keeps nothing beyond the run folder."""

    def start(self, run: RunInfo) -> None:
        """Nothing to open."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing to send."""

    def artifact(self, path: Path) -> None:
        """Nothing to copy."""

    def close(self, status: str, summary: Mapping[str, Any]) -> dict[str, Any]:
        """No facts for the summary."""
        return {}
