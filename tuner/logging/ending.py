"""`summary.json` of a run that broke off before it could log: while tokenizer, data and model were made or restored."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from tuner.errors import Interrupted, OutOfMemory, TunerError
from tuner.logging.disk import CONFIG, ENVIRONMENT, OVERRIDES, SUMMARY, read_metrics, write_json, write_whole
from tuner.logging.terminal import LOG, printable
from tuner.out_of_memory import is_out_of_memory, out_of_memory_said
from tuner.types import Logger, RunInfo, Summary

LINES = 20
_TAIL_BYTES = 2**16
"""Of the end of `run.log`: more than any 20 lines that a run writes."""


@contextmanager
def honest_end(
    config: Mapping[str, Any], overrides: Sequence[str], summary: Summary, logger: Callable[[], Logger]
) -> Iterator[None]:
    """Leave a summary of whatever the block raises, where the block has not written one itself.

    An input that is wrong leaves nothing behind, or what was there before it; only a run that was killed, whose folder
    does not say yet how it ended, is then said to have failed.

    Args:
        config: the resolved configuration.
        overrides: the words it was composed from.
        summary: of the run that the block makes; a `KeyboardInterrupt` stops it, everything else fails it.
        logger: makes the run's logger; one that knows the run from an earlier process is told the end.

    Raises:
        Interrupted: for a `KeyboardInterrupt`, with the command that goes on.
    """
    file, started = Path(summary.out) / SUMMARY, time.perf_counter()
    before = _identity(file)
    try:
        yield
    except BaseException as error:
        untold = _identity(file) in (None, before)
        begun = (file.parent / ENVIRONMENT).exists()
        if not untold or (is_wrong_input(error) and (not begun or before is not None)):
            raise
        summary.seconds = time.perf_counter() - started
        if isinstance(error, KeyboardInterrupt):
            summary.status = "stopped"
            summary.reason = f"stopped by {str(error) or 'Ctrl-C'} while the data and the model were prepared"
        else:
            summary.status, summary.reason = "failed", reason_of(error)
            summary.log_tail = last_words(file.parent, error)
        _tell(RunInfo(file.parent, config, overrides, {}, begun), summary, logger)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"{summary.reason}\nresume: {summary.resume}") from error
        raise


def is_wrong_input(error: BaseException) -> bool:
    """Whether a person's error is at the bottom: what builds objects from a configuration wraps what they raise.

    How much memory there is, is no input: a run that ran out of it is told like a bug, with where that was.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, TunerError):
        cause = cause.__cause__
    return cause is not None and not isinstance(cause, OutOfMemory)


def reason_of(error: BaseException) -> str:
    """What was raised, as `summary.json` says it."""
    return out_of_memory_said(error) if is_out_of_memory(error) else f"{type(error).__name__}: {error}"


def last_words(out: Path, error: BaseException) -> list[str]:
    """Write the traceback of a bug, or a person's error, into `run.log`; returns the last lines that are now in it."""
    said = f"error: {error}" if is_wrong_input(error) else "".join(traceback.format_exception(error))
    lines = [*tail(out), *printable(said).splitlines()]
    try:
        with (out / LOG).open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in printable(said).splitlines()))
    except OSError as problem:  # a full disk: the summary has the lines, if there is room for it
        lines.append(f"{out / LOG} could not be written: {problem.strerror}")
    return lines[-LINES:]


def tail(out: Path) -> list[str]:
    """The last lines of `run.log`; none where there is no such file."""
    log = out / LOG
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace").splitlines()[-LINES:]


def reached(out: Path) -> dict[str, Any]:
    """How far earlier processes got in a run folder, by the names of `Summary`: from their summary or metrics."""
    file = out / SUMMARY
    if file.exists():
        known = {field.name for field in fields(Summary)}
        return {key: value for key, value in json.loads(file.read_text(encoding="utf-8")).items() if key in known}
    found: dict[str, Any] = {}
    for row in read_metrics(out):
        found |= {"steps": row.step, "tokens": int(row.metrics.get("tokens", found.get("tokens", 0)))}
        if "train/loss" in row.metrics:
            found["train_loss"] = row.metrics["train/loss"]
        if "val/loss" in row.metrics:
            found["val_loss_before" if row.step == 0 else "val_loss"] = row.metrics["val/loss"]
    return found


def write_summary(summary: Summary) -> None:
    """Write `summary.json` of its run folder, whole or not at all."""
    write_json(Path(summary.out) / SUMMARY, asdict(summary))


def _tell(run: RunInfo, summary: Summary, logger: Callable[[], Logger]) -> None:
    """Write what the folder of a run that has not begun lacks, then its end; the logger last, since it may hang."""
    out = run.out
    now = ("status", "reason", "log_tail", "seconds", "resume")
    if run.resumed:
        for name, value in reached(out).items():
            if name not in now:
                setattr(summary, name, value)
    try:
        if not run.resumed:
            write_whole(out / CONFIG, yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True))
            write_whole(out / OVERRIDES, yaml.safe_dump(list(run.overrides), allow_unicode=True))
        write_summary(summary)
        if run.resumed:
            _tell_logger(run, summary, logger())
    except OSError as problem:  # what ended the run is what is raised; the heartbeat says it where there is no room
        summary.reason = f"{summary.reason}; no summary.json: {problem.strerror}"


def _tell_logger(run: RunInfo, summary: Summary, logger: Logger) -> None:
    dataset = json.loads((run.out / ENVIRONMENT).read_text(encoding="utf-8"))["dataset"]
    logger.start(RunInfo(run.out, run.config, run.overrides, dataset, resumed=True))
    facts = logger.close(summary.status, asdict(summary))
    summary.mlflow_run_id = facts.get("mlflow_run_id", summary.mlflow_run_id)
    write_summary(summary)


def _identity(file: Path) -> tuple[int, int] | None:
    """Tells one version of a file from the next."""
    if not file.exists():
        return None
    stat = file.stat()
    return stat.st_ino, stat.st_mtime_ns
