"""A sweep in MLflow: one parent run, every trial a child of it.

A tracking server takes what trials write while they run. A SQLite file takes one writer at a time, so trials that run
in parallel leave it alone (`logger.live=false`) and the sweep's own process replays their folders.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from sweeper.folder import SWEEP, SweepFolder
from sweeper.plan import Trial, swept_keys
from sweeper.results import RESULTS, Row, best_of
from tuner.errors import TunerError


class Tracking(Protocol):
    """Where trials are compared while and after they run."""

    def address(self, trial: Trial, config: DictConfig, out: Path) -> None:
        """Write into the trial's configuration and its run folder, which exists, where it belongs."""

    def publish(self, out: Path) -> str | None:
        """Bring a run folder there, if the trial does not do so itself; returns what went wrong, in a line."""

    def close(self, rows: Sequence[Row]) -> str | None:
        """The end of the sweep; returns how to look at it."""


class NoTracking:
    """For trials without MLflow."""

    def address(self, trial: Trial, config: DictConfig, out: Path) -> None: ...

    def publish(self, out: Path) -> str | None:
        return None

    def close(self, rows: Sequence[Row]) -> str | None:
        return None


class MlflowSweep:
    """The parent run of a sweep; made once, its id stands in `mlflow.json` of the sweep folder.

    Args:
        folder: of the sweep.
        trials: what was asked for.
        logger: the keys of the trials' MLflow logger, frozen.
        in_this_process: the trials run one after another here, so there is one writer anyway.

    Raises:
        TunerError: the store cannot be used.
    """

    def __init__(
        self, folder: SweepFolder, trials: Sequence[Trial], logger: Mapping[str, Any], in_this_process: bool
    ) -> None:
        from tuner import tracking

        self.folder = folder
        uri = logger["tracking_uri"]
        self.live = in_this_process or tracking.sqlite_file(uri) is None
        try:
            with tracking.silent():
                self._run = tracking.MlflowRun(
                    folder.path,
                    uri,
                    logger["experiment"],
                    f"sweep {folder.path.name}",
                    {**logger["tags"], "tuner.sweep": str(folder.path)},
                    logger["parent_run_id"],
                    logger["connect_timeout_s"],
                )
                self._run.params({"sweep": _axes(trials)})
        except tracking.store_errors() as problem:
            raise TunerError(f"the store {tracking.without_password(uri)} cannot be used ({problem})") from problem

    def address(self, trial: Trial, config: DictConfig, out: Path) -> None:
        from tuner.tracking import MlflowRecord

        for node in mlflow_loggers(config):
            node.parent_run_id = self._run.run_id
            node.run_name = node.run_name or trial.name or trial.id
            node.live = self.live
            node.tags = {**node.tags, **trial.values, "tuner.trial": trial.id}
            if MlflowRecord.read(out) is None:  # also a trial that dies before it begins is a child
                MlflowRecord(self._run.tracking_uri, self._run.experiment, None, complete=False).write(out)

    def publish(self, out: Path) -> str | None:
        return None if self.live else publish(out)

    def close(self, rows: Sequence[Row]) -> str | None:
        from tuner import tracking

        for row in rows:
            publish(row.out)  # one that died, was run alone since, or whose sweep was killed
        counts = Counter(row.status for row in rows)
        done = counts["finished"] == len(rows)
        best = best_of(rows)
        summary: dict[str, Any] = {"trials": len(rows), **counts}
        if best is not None:
            summary |= {"best_trial": best.entry.id, "best_objective": best.numbers["objective"]}
        try:
            with tracking.silent():
                for name in (SWEEP, RESULTS):
                    self._run.artifact(self.folder.path / name)
                self._run.end("finished" if done else "failed", summary, complete=True)
                return self._address()
        except tracking.store_errors() as problem:
            raise TunerError(f"the end of the sweep did not reach MLflow ({problem})") from problem

    def _address(self) -> str:
        """The runs table of the experiment: MLflow opens on pages that show none of it."""
        uri = self._run.tracking_uri
        experiment = self._run.client.get_run(self._run.run_id).info.experiment_id
        page = f"/#/experiments/{experiment}/runs?workflowType=machine_learning"
        if uri.startswith(("http://", "https://")):
            return f"{uri.rstrip('/')}{page}"
        return f"mlflow ui --backend-store-uri {shlex.quote(uri)}  # then http://127.0.0.1:5000{page}"


def publish(out: Path) -> str | None:
    """Bring a run folder into the store it names, unless all of it is there; returns what went wrong, in a line."""
    from tuner import tracking

    record = tracking.MlflowRecord.read(out)
    has_begun = (out / "environment.json").exists() or (out / "summary.json").exists()
    if record is None or record.complete or not has_begun:
        return None
    try:
        tracking.sync(out)
        if not (out / "summary.json").exists():  # it goes on, perhaps only since: what was brought is not its end
            replace(tracking.MlflowRecord.read(out) or record, complete=False).write(out)
    except TunerError as error:
        return f"{error}; `python -m tuner sync {out}` brings the trial into MLflow afterwards"
    return None


def mlflow_loggers(config: DictConfig) -> Iterator[DictConfig]:
    """The nodes of a run's MLflow loggers: its logger, or one of many."""
    from tuner.tracking import LOGGER

    logger = config.logger
    nodes = logger.loggers.values() if "loggers" in logger else [logger]
    yield from (node for node in nodes if node._target_ == LOGGER)


def settings_of(configs: Sequence[DictConfig]) -> dict[str, Any] | None:
    """The keys of the first MLflow logger among the trials; None if no trial has one."""
    for config in configs:
        for node in mlflow_loggers(config):
            settings = OmegaConf.to_container(node)
            assert isinstance(settings, dict)
            return {str(key): value for key, value in settings.items()}
    return None


def _axes(trials: Sequence[Trial]) -> dict[str, str]:
    """What each swept key was given: `peft.lora_rank: 4,8,16`."""
    values = [trial.values for trial in trials]
    keys = swept_keys(values)
    return {key: ",".join(dict.fromkeys(one[key] for one in values if key in one)) for key in keys}
