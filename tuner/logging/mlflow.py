"""MLflow as the place where runs are compared.

Importing MLflow takes seconds and a write to a local SQLite store milliseconds, so a thread does all of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from tuner.logging.background import BackgroundLogger
from tuner.logging.disk import CONFIG, ENVIRONMENT, OVERRIDES, Row
from tuner.logging.mlflow_run import MlflowRecord, MlflowRun
from tuner.logging.mlflow_store import silent, without_password
from tuner.types import NonNegativeFloat, PositiveFloat, RunInfo


class MLflowLogger(BackgroundLogger):
    """One MLflow run per run folder: config as params, metrics, dataset, artifacts and the true status.

    A store that is slow or away delays nothing: the reason is said once and `python -m tuner sync DIR` replays the run
    folder. `mlflow.json` in the run folder remembers the run, which a resumed run continues.

    Args:
        tracking_uri: address of the store; null for `MLFLOW_TRACKING_URI`, else `sqlite:///mlflow.db` in this folder.
        experiment: MLflow experiment; made if it is not there.
        run_name: null for the name of the run folder.
        tags: tags of the run.
        parent_run_id: MLflow run under which this one is shown, as a sweep's trials are.
        live: send while the run goes on. Twelve processes that write to one SQLite file take ten times as long as one,
            so trials in parallel leave it to the sweep, which replays their folders.
        system_metrics: also log processor, memory, disk and GPU use every ten seconds.
        flush_every_s: metrics are gathered this long and sent together.
        connect_timeout_s: how long one answer of a server may take (a user's MLFLOW_HTTP_REQUEST_TIMEOUT wins).
        close_timeout_s: how long the end of a run waits for what is still to be sent.
    """

    backend: ClassVar[str] = "MLflow"
    remedy: ClassVar[str] = "the run goes on, and `python -m tuner sync {out}` brings it into MLflow afterwards"

    def __init__(
        self,
        tracking_uri: str | None,
        experiment: str,
        run_name: str | None,
        tags: dict[str, str],
        parent_run_id: str | None,
        live: bool,
        system_metrics: bool,
        flush_every_s: PositiveFloat,
        connect_timeout_s: PositiveFloat,
        close_timeout_s: NonNegativeFloat,
    ) -> None:
        super().__init__(flush_every_s, close_timeout_s)
        self.tracking_uri = tracking_uri or default_tracking_uri()
        self.experiment = experiment
        self.run_name = run_name
        self.tags = tags
        self.parent_run_id = parent_run_id
        self.live = live
        self.system_metrics = system_metrics
        self.connect_timeout_s = connect_timeout_s
        self._run: MlflowRun | None = None
        self._continues = False
        self._monitor: Any = None

    def start(self, run: RunInfo) -> None:
        """Start the thread and note in `mlflow.json` where the run is meant to go."""
        record = MlflowRecord.read(run.out)
        # A run that was killed before its first checkpoint begins anew, and is still the one that MLflow shows running.
        # And a trial that is run again is one child of its sweep, however often it began.
        is_trial = self.parent_run_id is not None
        goes_on = record is not None and (run.resumed or not record.complete or is_trial)
        same = record is not None and record.tracking_uri == self.tracking_uri
        run_id = record.run_id if record is not None and goes_on and same else None
        self._continues = run_id is not None
        run.out.mkdir(parents=True, exist_ok=True)
        MlflowRecord(self.tracking_uri, self.experiment, run_id, complete=False).write(run.out)
        if self.live:
            super().start(run)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.live:
            super().log(step, metrics)

    def artifact(self, path: Path) -> None:
        if self.live:
            super().artifact(path)

    def close(self, status: str, summary: Mapping[str, Any]) -> dict[str, Any]:
        return super().close(status, summary) if self.live else {}

    def open(self, run: RunInfo) -> dict[str, Any]:
        """Reach the store, create or continue the run, log params, dataset and what the run folder holds already."""
        self._run = MlflowRun(
            run.out,
            self.tracking_uri,
            self.experiment,
            self.run_name,
            self.tags,
            self.parent_run_id,
            self.connect_timeout_s,
        )
        self._run.params(run.config)
        self._run.dataset(run.dataset)
        for name in (CONFIG, OVERRIDES, ENVIRONMENT):
            if (run.out / name).exists():
                self._run.artifact(run.out / name)
        if self.system_metrics and self._monitor is None:
            self._monitor = _monitor(self._run.run_id, self.tracking_uri, self._continues)
        return {"mlflow_run_id": self._run.run_id}

    def write(self, rows: Sequence[Row]) -> None:
        self._opened().metrics(rows)

    def keep(self, path: Path) -> None:
        self._opened().artifact(path)

    def finish(self, status: str, summary: Mapping[str, Any], complete: bool) -> None:
        if self._monitor is not None:
            self._monitor.finish()
        self._opened().end(status, summary, complete)

    def reason(self, problem: Exception) -> str:
        """Names the store, since it may come from the environment."""
        return f"the store {without_password(self.tracking_uri)} cannot be used ({super().reason(problem)})"

    def quiet(self) -> AbstractContextManager[None]:
        return silent()

    def _opened(self) -> MlflowRun:
        if self._run is None:
            raise RuntimeError("MLflowLogger: open comes before write, keep and finish")
        return self._run


def default_tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, else a SQLite file in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(Path.cwd() / 'mlflow.db').as_posix()}"


def _monitor(run_id: str, tracking_uri: str, resumed: bool) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=resumed, tracking_uri=tracking_uri)
    monitor.start()
    return monitor
