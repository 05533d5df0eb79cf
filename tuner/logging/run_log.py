"""Terminal, run folder and the chosen logger, told the same things in the same order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tuner.logging.disk import SUMMARY, DiskLogger, Generation, write_json
from tuner.logging.terminal import Terminal
from tuner.types import Logger, RunInfo, Summary


class RunLog:
    """Everything a run says.

    Args:
        terminal: what the person sees.
        disk: the files of the run folder.
        logger: the member of the `logger` group.
    """

    def __init__(self, terminal: Terminal, disk: DiskLogger, logger: Logger) -> None:
        self.terminal = terminal
        self.disk = disk
        self.logger = logger

    def start(self, run: RunInfo) -> None:
        self.disk.start(run)
        self.logger.start(run)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics, everywhere."""
        self.disk.log(step, metrics)
        self.terminal.step(step, {name: value for name, value in metrics.items() if name != "tokens"})
        self.logger.log(step, metrics)

    def flush(self) -> None:
        """Bring the lines of metrics to the disk, ahead of a checkpoint: a power cut must not leave it without them."""
        self.disk.flush()

    def artifact(self, path: Path) -> None:
        self.logger.artifact(path)

    def samples(self, generations: Sequence[Generation]) -> None:
        """Show, save and keep the generations before and after."""
        if generations:
            self.terminal.samples(generations)
            self.logger.artifact(self.disk.samples(generations))

    def close(self, summary: Summary) -> None:
        """Write `summary.json`, first without what only the logger knows, so that a logger that hangs hides nothing."""
        self.disk.close(summary.status, asdict(summary))
        facts = self.logger.close(summary.status, asdict(summary))
        summary.mlflow_run_id = facts.get("mlflow_run_id")
        write_json(self.disk.out / SUMMARY, asdict(summary))
