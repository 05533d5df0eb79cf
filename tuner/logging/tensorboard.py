"""TensorBoard event files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tuner.logging.background import BackgroundLogger
from tuner.logging.disk import Row
from tuner.logging.extras import require
from tuner.logging.flat import flatten, numbers
from tuner.types import NonNegativeFloat, PositiveFloat, RunInfo

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(BackgroundLogger):
    """Metrics as scalars, the config and the summary's numbers as hyperparameters; files stay in the run folder.

    Args:
        log_dir: folder of the event files; null for `tensorboard` in the run folder.
        flush_every_s: metrics are gathered this long and written together.
        close_timeout_s: how long the end of a run waits for what is still to be written.

    Raises:
        TunerError: if tensorboard is not installed.
    """

    backend: ClassVar[str] = "TensorBoard"
    remedy: ClassVar[str] = "the run goes on, and {out}/metrics.jsonl holds what is missing there"

    def __init__(self, log_dir: str | None, flush_every_s: PositiveFloat, close_timeout_s: NonNegativeFloat) -> None:
        require("tensorboard", "tensorboard")
        super().__init__(flush_every_s, close_timeout_s)
        self.log_dir = log_dir
        self._writer: SummaryWriter | None = None

    def open(self, run: RunInfo) -> dict[str, Any]:
        """Only makes the folder: which steps of an earlier process are void is known at the first row."""
        self._info = run
        self._folder = Path(self.log_dir) if self.log_dir is not None else run.out / "tensorboard"
        self._folder.mkdir(parents=True, exist_ok=True)
        return {}

    def write(self, rows: Sequence[Row]) -> None:
        writer = self._opened(rows[0].step)
        for row in rows:
            for key, value in row.metrics.items():
                writer.add_scalar(key, value, row.step, row.time)
        writer.flush()

    def keep(self, path: Path) -> None:
        """Nothing to do: TensorBoard holds no files."""

    def finish(self, status: str, summary: Mapping[str, Any], complete: bool) -> None:
        writer = self._opened(int(summary.get("steps", 0)))
        config = {
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in flatten(self._info.config).items()
        }
        results = {f"summary/{key}": value for key, value in numbers(summary).items()}
        writer.add_hparams({**config, "status": status}, results, run_name=".")
        writer.close()

    def quiet(self) -> AbstractContextManager[None]:
        return _without_nan_notice()

    def _opened(self, step: int) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = step if self._info.resumed else None
            self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
        return self._writer


@contextmanager
def _without_nan_notice() -> Iterator[None]:
    """A loss of NaN is a value to show; the writer's own remark about it names neither key nor step."""
    logger = logging.getLogger("torch.utils.tensorboard._utils")

    def nothing(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)
