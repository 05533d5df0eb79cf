"""What has become of a run, from its folder: its summary, or the process that its heartbeat names."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuner.logging.disk import CONFIG, ENVIRONMENT, METRICS, SUMMARY
from tuner.logging.heartbeat import HEARTBEAT, Beat, read_beat
from tuner.types import Summary

_METRICS_TAIL_BYTES = 2**14
"""Of the end of `metrics.jsonl`, about fifty lines."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        state: `running`, `finished`, `stopped`, `failed`, `killed` (its process is gone and could not say how it
            ended), or `unknown` for a folder with neither a summary nor a heartbeat.
        since_s: when it ended or, while it runs, when it was last heard of, in seconds since the epoch by the clock of
            the folder's file system.
        steps, total_steps: done and to do, as far as that is said; of a killed run the last one that was logged.
        val_loss: of the last evaluation.
        objective: of a finished run.
        seconds: that the last process took; None of one that could not say it.
        reason: why it stopped, failed or is thought to be killed.
        resume: the command that goes on with it.
        told: whether `summary.json` says so.
    """

    state: str
    since_s: float
    steps: int = 0
    total_steps: int | None = None
    val_loss: float | None = None
    objective: float | None = None
    seconds: float | None = None
    reason: str | None = None
    resume: str | None = None
    told: bool = False


def is_run(out: Path) -> bool:
    """Whether a run has begun in a folder; a trial's folder is there before."""
    if (out / HEARTBEAT).exists():
        return True
    return (out / CONFIG).exists() and ((out / SUMMARY).exists() or (out / ENVIRONMENT).exists())


def state_of(out: Path) -> RunState:
    """Where the run of a folder stands; nothing is locked or written for it.

    A summary counts unless it is older than the process of the heartbeat, which had begun to go on with the run. One
    that this process has written itself counts though it is there still: it is only closing its logger.
    """
    found = read_beat(out)
    summary = _read_summary(out / SUMMARY)
    ended_s = (out / SUMMARY).stat().st_mtime if summary is not None else 0.0
    if found is not None and ended_s < (found[0].began_s or found[1]):
        beat, beaten_s = found
        if beat.alive(lambda: clock_of(out) - beaten_s):
            return _of_process(out, "running", beat, beaten_s, None)
        gone = f"process {beat.pid} on {beat.host} is gone"
        return _of_process(out, "failed" if beat.reason else "killed", beat, beaten_s, beat.reason or gone)
    if summary is not None:
        return _of_summary(summary, ended_s)
    last = _last_metrics(out / METRICS)
    heard_s = max(file.stat().st_mtime for file in (out / CONFIG, out / METRICS) if file.exists())
    reason = "neither summary.json nor heartbeat.json: of an earlier version, or its disk was full"
    return RunState("unknown", heard_s, int(last.get("step", 0)), val_loss=last.get("val/loss"), reason=reason)


def clock_of(folder: Path) -> float:
    """What time the file system of a folder has, in seconds since the epoch: a server's may not be this machine's.

    A file without a name is made there for a moment; where that is not allowed, it is this machine's time.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def _of_process(out: Path, state: str, beat: Beat, beaten_s: float, reason: str | None) -> RunState:
    """What the heartbeat and the lines that were logged tell."""
    metrics = out / METRICS
    heard_s = max(beaten_s, metrics.stat().st_mtime) if metrics.exists() else beaten_s
    last = _last_metrics(metrics)
    steps = max(beat.step, int(last.get("step", 0)))
    return RunState(
        state,
        heard_s,
        steps,
        beat.total_steps,
        last.get("val/loss"),
        seconds=None if beat.began_s is None else heard_s - beat.began_s,
        reason=reason,
        resume=beat.resume,
    )


def _of_summary(summary: Mapping[str, Any], ended_s: float) -> RunState:
    said = {**asdict(Summary(summary["status"], "")), **summary}  # of an earlier version, it lacks what came since
    return RunState(
        said["status"],
        ended_s,
        said["steps"],
        said["total_steps"],
        _number(said["val_loss"]),
        _number(said["objective"]),
        said["seconds"],
        said["reason"],
        said["resume"],
        told=True,
    )


def _last_metrics(file: Path) -> dict[str, float]:
    """The last step that was logged and the last `val/loss` near it; a line that is being written is left out."""
    if not file.exists():
        return {}
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - _METRICS_TAIL_BYTES))
        first = 0 if opened.tell() == 0 else 1  # cut where it was begun to be read
        lines = [line for line in opened.read().splitlines(keepends=True)[first:] if line.endswith(b"\n")]
    evaluated: dict[str, Any] = next((json.loads(line) for line in reversed(lines) if b'"val/loss"' in line), {})
    last = {"step": json.loads(lines[-1])["step"]} if lines else {}
    return {name: float(value) for name, value in {**evaluated, **last}.items() if name in ("step", "val/loss")}


def _read_summary(file: Path) -> dict[str, Any] | None:
    try:
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return summary


def _number(value: Any) -> float | None:
    """A number of `summary.json`, where what JSON has no number for is a word."""
    return None if value is None else float(value)
