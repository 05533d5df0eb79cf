"""The files of a run folder: the truth that every other logger can be rebuilt from.

Always on, whatever `logger` says. `metrics.jsonl` is appended to and flushed line by line, so that a killed run loses
nothing; every other file is written whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml

from tuner.logging.environment import environment
from tuner.types import RunInfo

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
ENVIRONMENT = "environment.json"
SUMMARY = "summary.json"
SAMPLES = "samples.json"

_NOT_A_METRIC = ("step", "time")
_SHARED = ("tokens",)  # stands in every line of a step, training or validation, with one value


@dataclass(frozen=True)
class Generation:
    """What the model wrote for one validation prompt before and after training, and the true reply."""

    prompt: str
    reply: str
    before: str
    after: str


@dataclass(frozen=True)
class Row:
    """One line of `metrics.jsonl`: `time` in seconds since the epoch."""

    step: int
    time: float
    metrics: Mapping[str, float]


class DiskLogger:
    """Writes `config.yaml`, `overrides.yaml`, `environment.json`, `metrics.jsonl`, `samples.json` and `summary.json`.

    Unlike the other loggers this one raises (`OSError`): a run whose results cannot be written is not worth going on.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._file: TextIO | None = None
        self._continues = False

    def start(self, run: RunInfo) -> None:
        """Write what is known before the first step; a fresh run begins `metrics.jsonl` anew, a resumed one goes on."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / SUMMARY).unlink(missing_ok=True)  # a run that goes on has not ended, whatever kills it
        write_whole(self.out / CONFIG, yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True))
        write_whole(self.out / OVERRIDES, yaml.safe_dump(list(run.overrides), allow_unicode=True))
        write_json(self.out / ENVIRONMENT, {**environment(), "dataset": dict(run.dataset)})
        metrics = self.out / METRICS
        self._continues = run.resumed and metrics.exists()
        if self._continues:
            _write_rows(metrics, read_metrics(self.out))  # drops a last line that was cut short
        self._file = metrics.open("a" if self._continues else "w", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line. Values that JSON has no number for are the strings `NaN`, `Infinity`, `-Infinity`."""
        if self._continues:
            self._forget_from(step, metrics)
        file = self._opened()
        file.write(_line(Row(step, time.time(), metrics)))
        file.flush()

    def flush(self) -> None:
        """Return when what was logged is on the disk."""
        os.fsync(self._opened().fileno())

    def artifact(self, path: Path) -> None:
        """Nothing to do: artifacts are files of the run folder already."""

    def samples(self, generations: Sequence[Generation]) -> Path:
        """Write `samples.json` and return its path."""
        write_json(self.out / SAMPLES, [asdict(generation) for generation in generations])
        return self.out / SAMPLES

    def close(self, status: str, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write `summary.json`."""
        self._opened().close()
        write_json(self.out / SUMMARY, {**summary, "status": status})
        return {}

    def _forget_from(self, step: int, metrics: Mapping[str, float]) -> None:
        """Drop the steps a killed process logged past its last checkpoint: this process trains them again."""
        self._continues = False
        self._opened().close()
        rows = read_metrics(self.out)
        again = set(metrics) - set(_SHARED)
        kept = [row for row in rows if row.step < step]
        if "train/loss" not in metrics:  # saved before its evaluation; a step that is trained again is evaluated again
            kept += [row for row in rows if row.step == step and not again & {*row.metrics}]
        _write_rows(self.out / METRICS, kept)
        self._file = (self.out / METRICS).open("a", encoding="utf-8")

    def _opened(self) -> TextIO:
        if self._file is None:
            raise RuntimeError("DiskLogger: start comes before log and close")
        return self._file


def read_metrics(out: Path) -> list[Row]:
    """The rows of `metrics.jsonl`; a last line without its end, as a kill leaves it, is not a row."""
    path = out / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [_row(json.loads(line)) for line in lines if line.endswith("\n")]


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; for floats outside JSON see `DiskLogger.log`."""
    write_whole(path, json_text(value))


def json_text(value: Any) -> str:
    """`value` as indented JSON that every reader accepts."""
    return json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, at any time and after a power cut, finds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_whole(path, "".join(map(_line, rows)))


def _line(row: Row) -> str:
    return json.dumps(_plain({"step": row.step, "time": round(row.time, 3), **row.metrics}), allow_nan=False) + "\n"


def _row(fields: dict[str, Any]) -> Row:
    metrics = {
        key: float(value) if isinstance(value, str) else value  # "NaN", "Infinity", "-Infinity"
        for key, value in fields.items()
        if key not in _NOT_A_METRIC
    }
    return Row(fields["step"], fields["time"], metrics)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | int | float):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)  # numpy and torch scalars; paths, dates
