"""One MLflow run as a place to write a run folder to, shared by the live logger and by `sync`.

Everything goes through `MlflowClient` with ids said explicitly: MLflow's fluent interface keeps an active run in global
state, which two runs in one process would share. Writing twice is harmless: params, metrics and datasets that the
store holds already are left out, so a resumed run and a replay continue what is there.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tuner.logging.disk import SUMMARY, Row, json_text, write_json
from tuner.logging.flat import flatten, numbers
from tuner.logging.mlflow_store import open_store, patient, without_password

RECORD = "mlflow.json"
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "killed": "KILLED"}
MAX_VALUE_CHARACTERS = 6000
_PARAMS_A_BATCH = 100
_METRICS_A_BATCH = 1000
_MAX_KEY_CHARACTERS = 250
_MAX_DIGEST_CHARACTERS = 36
_LABELS = ("logger.run_name", "logger.tags", "logger.parent_run_id")
"""Keys that name the run in MLflow; as params they would be the first ones in which the trials of a sweep differ."""

_MEASURED = ("perf/", "memory/")
"""Metrics that come out otherwise where a step is trained again, after a crash: the first value of a step stays."""


@dataclass(frozen=True)
class MlflowRecord:
    """`mlflow.json` of a run folder: where the run is in MLflow, so that it is continued and not made anew.

    Attributes:
        run_id: null until the store has been reached.
        complete: whether the store is known to hold everything, the end included.
    """

    tracking_uri: str
    experiment: str
    run_id: str | None
    complete: bool

    @classmethod
    def read(cls, out: Path) -> MlflowRecord | None:
        """The record of a run folder, if it has one."""
        path = out / RECORD
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def write(self, out: Path) -> None:
        write_json(out / RECORD, asdict(self))


class MlflowRun:
    """An open run in an MLflow store.

    Args:
        out: the run folder; its `mlflow.json` says which run to continue, if the store is the same and still has it.
        run_name: null for the name of the run folder.
        tags, parent_run_id: given to a new run.
        connect_timeout_s: how long one answer of a server may take.
        start_s: when a new run began, in seconds since the epoch; null for now.

    Raises:
        Exception: of many kinds, where the store cannot be reached.
    """

    def __init__(
        self,
        out: Path,
        tracking_uri: str,
        experiment: str,
        run_name: str | None,
        tags: Mapping[str, str],
        parent_run_id: str | None,
        connect_timeout_s: float,
        start_s: float | None = None,
    ) -> None:
        self.out = out
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self._timeout_s = connect_timeout_s
        with self._patient():
            self.client, experiment_id = open_store(tracking_uri, experiment, connect_timeout_s)
            known = self._known_run()
            self.run_id = known or self._new_run(experiment_id, run_name or out.name, tags, parent_run_id, start_s)
            self.record(complete=False)
            run = self.client.get_run(self.run_id)
            self._params: dict[str, str] = dict(run.data.params)
            self._tags = {*run.data.tags}
            self._latest: dict[str, tuple[int, float | None]] = {}  # `tokens` stands in several lines of one step
            self._points = {key: self._history(key) for key in run.data.metrics if not key.startswith("system/")}
            measured = {key: points for key, points in self._points.items() if key.startswith(_MEASURED)}
            self._measured = {key: {step for step, _ in points} for key, points in measured.items()}
            if run.info.status != "RUNNING":
                self.client.update_run(self.run_id, status="RUNNING")

    def params(self, config: Mapping[str, Any]) -> None:
        """The resolved config, flat with dots; MLflow's params never change: a new value becomes a `resumed.` tag."""
        from mlflow.entities import Param, RunTag

        flat = params_of(config)
        new = [Param(key, value) for key, value in flat.items() if key not in self._params]
        changed = {key: value for key, value in flat.items() if self._params.get(key, value) != value}
        with self._patient():
            for params in _batches(new, _PARAMS_A_BATCH):
                self.client.log_batch(self.run_id, params=params)
            for tags in _batches([RunTag(f"resumed.{key}", value) for key, value in changed.items()], _PARAMS_A_BATCH):
                self.client.log_batch(self.run_id, tags=tags)
        self._params = {**flat, **self._params}

    def dataset(self, dataset: Mapping[str, Any]) -> None:
        """The data as MLflow's dataset input; its digest holds the first 36 characters of the fingerprint."""
        from mlflow.entities import Dataset, DatasetInput

        entry = Dataset(
            name=str(dataset["name"]),
            digest=str(dataset["fingerprint"])[:_MAX_DIGEST_CHARACTERS],
            source_type="tuner",
            source=json.dumps({"name": dataset["name"]}),
            profile=json.dumps(dict(dataset), default=str),
        )
        with self._patient():
            self.client.log_inputs(self.run_id, datasets=[DatasetInput(dataset=entry, tags=[])])

    def metrics(self, rows: Iterable[Row]) -> int:
        """Send what the run does not hold yet; returns how many values that were."""
        new = []
        latest = dict(self._latest)
        for row in rows:
            for key, value in ((sanitise(key), float(value)) for key, value in row.metrics.items()):
                point = _point(row.step, value)
                if latest.get(key) != point and not self._holds(key, point):
                    new.append((key, value, row))
                latest[key] = point
        self._send(new)
        self._latest = latest
        return len(new)

    def _holds(self, key: str, point: tuple[int, float | None]) -> bool:
        return point in self._points.get(key, ()) or point[0] in self._measured.get(key, ())

    def artifact(self, path: Path) -> None:
        """Copy a file or folder under the same path as in the run folder (one from elsewhere: under its name)."""
        place = path.relative_to(self.out) if path.is_relative_to(self.out) else Path(path.name)
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), str(place.as_posix()))
        else:
            parent = place.parent.as_posix()
            self.client.log_artifact(self.run_id, str(path), None if parent == "." else parent)

    def end(self, status: str, summary: Mapping[str, Any], complete: bool, end_s: float | None = None) -> None:
        """Log the summary's numbers as metrics and its words as tags, set the true status, keep `summary.json`.

        What an earlier end said and this one does not, as why the run stopped, is taken away.
        """
        stale = [sanitise(key) for key, value in summary.items() if value is None and sanitise(key) in self._tags]
        words = {key: value for key, value in summary.items() if isinstance(value, str)}
        self.metrics([Row(int(summary.get("steps", 0)), end_s or time.time(), numbers(summary))])
        with self._patient():
            for key, value in words.items():
                self.client.set_tag(self.run_id, sanitise(key), value[:MAX_VALUE_CHARACTERS])
            for key in stale:
                self.client.delete_tag(self.run_id, key)
            self.client.set_terminated(self.run_id, STATUS[status], None if end_s is None else int(end_s * 1000))
        self.client.log_text(self.run_id, json_text({**summary, "mlflow_run_id": self.run_id}), SUMMARY)
        self.record(complete)

    def broke_off(self, state: str, reason: str, end_s: float) -> None:
        """Say how a run ended that could not: `killed` or `failed`; it goes on as the same one if it is resumed."""
        with self._patient():
            self.client.set_tag(self.run_id, "status", state)
            self.client.set_tag(self.run_id, "reason", reason[:MAX_VALUE_CHARACTERS])
            self.client.set_terminated(self.run_id, STATUS[state], int(end_s * 1000))

    def record(self, complete: bool) -> None:
        """Write `mlflow.json`."""
        MlflowRecord(self.tracking_uri, self.experiment, self.run_id, complete).write(self.out)

    def _send(self, points: Sequence[tuple[str, float, Row]]) -> None:
        from mlflow.entities import Metric

        with self._patient():
            for batch in _batches(points, _METRICS_A_BATCH):
                metrics = [Metric(key, value, int(row.time * 1000), row.step) for key, value, row in batch]
                self.client.log_batch(self.run_id, metrics=metrics)

    def _known_run(self) -> str | None:
        from mlflow.exceptions import MlflowException

        record = MlflowRecord.read(self.out)
        if record is None or record.run_id is None or record.tracking_uri != self.tracking_uri:
            return None
        try:
            run = self.client.get_run(record.run_id)
        except MlflowException as problem:
            if problem.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None  # the store was made anew since
            raise
        return record.run_id if run.info.lifecycle_stage == "active" else None

    def _new_run(
        self, experiment_id: str, name: str, tags: Mapping[str, str], parent_run_id: str | None, start_s: float | None
    ) -> str:
        own = {"tuner.out": str(self.out)}
        if parent_run_id is not None:
            own["mlflow.parentRunId"] = parent_run_id
        start_ms = None if start_s is None else int(start_s * 1000)
        run = self.client.create_run(experiment_id, start_time=start_ms, tags={**own, **tags}, run_name=name)
        return str(run.info.run_id)

    def _history(self, key: str) -> set[tuple[int, float | None]]:
        return {_point(point.step, point.value) for point in self.client.get_metric_history(self.run_id, key)}

    def _patient(self) -> AbstractContextManager[None]:
        return patient(self._timeout_s)


def params_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The config as MLflow takes it: flat, every key allowed and unique, values of at most 6,000 characters.

    A group's member is a param too (`optimizer: adamw`), so that a swept group is an axis of MLflow's plots.
    """
    params: dict[str, str] = {group: name for group, node in config.items() if (name := _member(node))}
    for key, value in flatten(config).items():
        if key.startswith(_LABELS):
            continue
        params[_free(sanitise(key), params)] = without_password(str(value))[:MAX_VALUE_CHARACTERS]
    return params


def _member(node: Any) -> str | None:
    """What a group's member is called, as `optimizer=adamw` calls it; None for what is no member."""
    if not isinstance(node, Mapping) or not isinstance(target := node.get("_target_"), str):
        return None
    return str(node.get("name") or target.split(".")[-2 if target.startswith("tuner.") else -1])


def sanitise(key: str) -> str:
    """`key` with what MLflow refuses (`+`, `@`, `//`, a leading `/`, too long a name) made acceptable."""
    words = re.sub(r"[^\w\-. :/]", "_", key).lstrip("/")
    path = posixpath.normpath(words)
    return ("_" + path if path.startswith(".") else path)[:_MAX_KEY_CHARACTERS]


def _point(step: int, value: float) -> tuple[int, float | None]:
    """A metric's identity in the store, where infinities are the largest doubles and NaN is not equal to itself."""
    largest = 1.7976931348623157e308
    return step, None if math.isnan(value) else max(-largest, min(largest, value))


def _free(key: str, taken: Mapping[str, str]) -> str:
    """Two keys that became one when they were sanitised stay two."""
    number, free = 2, key
    while free in taken:
        free, number = f"{key}_{number}", number + 1
    return free


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
