"""`tuner sync DIR`: a run folder into MLflow, for a run whose store was away or that had no MLflow logger."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tuner.config import conf_dir
from tuner.errors import TunerError
from tuner.logging.background import root_cause
from tuner.logging.disk import CONFIG, ENVIRONMENT, OVERRIDES, SAMPLES, SUMMARY, Row, read_metrics
from tuner.logging.mlflow import MLflowLogger, default_tracking_uri
from tuner.logging.mlflow_run import STATUS, MlflowRecord, MlflowRun
from tuner.logging.mlflow_store import silent, store_errors, without_password
from tuner.runs import RunState, state_of

KEPT = (CONFIG, OVERRIDES, ENVIRONMENT, SAMPLES, "adapter")
_TARGET = f"{MLflowLogger.__module__}.{MLflowLogger.__qualname__}"


def sync(run_dir: str | Path) -> str:
    """Replay a run folder into MLflow; what the store holds already is left as it is, so it may be called again.

    A run that was killed, which its heartbeat tells, is KILLED there.

    The store is the one where the run was begun (`mlflow.json`); where none was reached, `MLFLOW_TRACKING_URI`, else
    the store that the run was meant for, else `sqlite:///mlflow.db` in the working directory.

    Returns:
        One line that says what was done.

    Raises:
        TunerError: if `run_dir` is not a run folder or the store cannot be used.
    """
    folder = _read(Path(run_dir).expanduser().resolve())
    uri = _tracking_uri(MlflowRecord.read(folder.out), folder.settings)
    try:
        with silent():
            run_id, new_values = _replay(folder, uri)
    except store_errors() as problem:
        raise TunerError(f"the store {without_password(uri)} cannot be used ({root_cause(problem)})") from problem
    still = "" if folder.summary else f"; {_without_summary(folder.state)}"
    return f"{folder.out} is run {run_id} in {without_password(uri)}, {new_values} metric values new{still}"


@dataclass(frozen=True)
class _RunFolder:
    """What a run folder says; `summary` is null where the run has not ended or could not say so.

    `dataset` is null where a run ended before it had one: a trial whose data could not be read.
    """

    out: Path
    config: dict[str, Any]
    settings: dict[str, Any]
    dataset: dict[str, Any] | None
    rows: list[Row]
    started_s: float
    state: RunState
    summary: dict[str, Any] | None


def _read(out: Path) -> _RunFolder:
    if not (out / CONFIG).exists():
        raise TunerError(f"{out} is not a run folder: it has no {CONFIG}")
    environment, summary, state = out / ENVIRONMENT, out / SUMMARY, state_of(out)
    if not environment.exists() and not summary.exists():
        raise TunerError(f"{out} is not a run folder: it has no {ENVIRONMENT}")
    config = yaml.safe_load((out / CONFIG).read_text(encoding="utf-8"))
    rows = read_metrics(out)
    return _RunFolder(
        out=out,
        config=config,
        settings=_settings(config["logger"]),
        dataset=json.loads(environment.read_text(encoding="utf-8"))["dataset"] if environment.exists() else None,
        rows=rows,
        started_s=rows[0].time if rows else (out / CONFIG).stat().st_mtime,
        state=state,
        summary=json.loads(summary.read_text(encoding="utf-8")) if state.told else None,
    )


def _replay(folder: _RunFolder, uri: str) -> tuple[str, int]:
    """Id of the run and how many metric values were not there yet."""
    words = folder.settings
    run = MlflowRun(
        folder.out,
        uri,
        words["experiment"],
        words["run_name"],
        words["tags"],
        words["parent_run_id"],
        words["connect_timeout_s"],
        folder.started_s,
    )
    run.params(folder.config)
    if folder.dataset is not None:
        run.dataset(folder.dataset)
    new_values = run.metrics(folder.rows)
    for name in KEPT:
        if (folder.out / name).exists():
            run.artifact(folder.out / name)
    if folder.summary is not None:
        run.end(folder.summary["status"], folder.summary, complete=True, end_s=folder.state.since_s)
    elif folder.state.state in STATUS:
        run.broke_off(folder.state.state, str(folder.state.reason), folder.state.since_s)
    return run.run_id, new_values


def _without_summary(state: RunState) -> str:
    """What is known of a run that has not said how it ended, and its status at MLflow."""
    if state.state in STATUS:
        how = "was killed" if state.state == "killed" else state.state
        return f"it {how} ({state.reason}), so it is {STATUS[state.state]} there"
    what = "is running" if state.state == "running" else "has no summary.json (running, or killed)"
    return f"it {what}, so it stays RUNNING there"


def _settings(logger: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the run's MLflow logger, alone or among many; for a run that had none, those of the logger group."""
    for candidate in logger["loggers"].values() if "loggers" in logger else (logger,):
        if candidate["_target_"] == _TARGET:
            return dict(candidate)
    defaults: dict[str, Any] = yaml.safe_load((conf_dir() / "logger" / "mlflow.yaml").read_text(encoding="utf-8"))
    return defaults


def _tracking_uri(record: MlflowRecord | None, settings: Mapping[str, Any]) -> str:
    if record is not None and record.run_id is not None:
        return record.tracking_uri
    return os.environ.get("MLFLOW_TRACKING_URI") or settings["tracking_uri"] or default_tracking_uri()
