"""One trial: a run folder whose configuration was frozen when the sweep was submitted, and the run in it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import tuner
from tuner.errors import ConfigError, Interrupted, RunBusy, TunerError
from tuner.runs import reached, tail, trust_words, write_summary
from tuner.types import Summary

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
SUMMARY = "summary.json"
MLFLOW = "mlflow.json"
LOG = "process.log"
"""A link to what the process of a trial that did not finish has printed, kept by its launcher."""
LOOK_S = 2.0
"""How often a trial that another process runs is looked at."""


def prepare(out: Path, config: DictConfig, words: Sequence[str]) -> None:
    """Make the run folder with its frozen configuration; one that is there already is left as it is."""
    if not (out / CONFIG).exists():
        out.mkdir(parents=True, exist_ok=True)
        (out / OVERRIDES).write_text(yaml.safe_dump(list(words), allow_unicode=True), encoding="utf-8")
        unfinished = out / f".{CONFIG}"
        OmegaConf.save(config, unfinished)
        unfinished.replace(out / CONFIG)


def clear(out: Path) -> None:
    """Take away what a trial found; which MLflow run it is stays, so that it is one there however often it is run."""
    for entry in out.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != MLFLOW:
            entry.unlink()


def command(out: Path) -> str:
    """What runs this trial alone, in a terminal; code from elsewhere has to be trusted there, not by the folder."""
    frozen = yaml.safe_load((out / CONFIG).read_text(encoding="utf-8")) if (out / CONFIG).exists() else {}
    return shlex.join(["python", "-m", "sweeper", "trial", str(out), *trust_words(frozen)])


def run_submitted(config: DictConfig) -> float | None:
    """The task that launchers run: the trial of Hydra's output folder. What it was composed of is not looked at.

    Returns:
        Its objective.

    Raises:
        KeyboardInterrupt: it was told to stop and has saved; no further trial is to begin in this process.
    """
    try:
        return run_trial(Path(HydraConfig.get().runtime.output_dir)).objective
    except Interrupted as stopped:
        raise KeyboardInterrupt(str(stopped)) from stopped
    except TunerError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise
    except Exception:
        traceback.print_exc()  # Hydra keeps the error and drops where it came from
        raise


def run_trial(out: Path, trusted: Sequence[str] | None = None) -> Summary:
    """Run or continue what stands in `out`, and leave a summary whatever happens.

    Where another process is at work there, wait for its end and then go on from what it left, which may be nothing to
    do: SLURM starts a job again whose node it cannot reach, and a sweep that was killed has left its jobs running.

    Args:
        out: the trial's folder.
        trusted: what `trust_targets` is, whatever the folder says; None for a folder that this sweep has made itself.

    Raises:
        TunerError: as `tuner.run`.
    """
    config = OmegaConf.load(out / CONFIG)
    assert isinstance(config, DictConfig)
    if trusted is not None:
        config.trust_targets = list(trusted)
    words = yaml.safe_load((out / OVERRIDES).read_text(encoding="utf-8"))
    print(f"trial {out.name}: {shlex.join(words)}\nalone: {command(out)}", flush=True)
    try:
        return _run_when_free(out, config, words)
    except Interrupted:
        raise
    except Exception as error:
        record_death(out, f"{type(error).__name__}: {error}")
        raise


def _run_when_free(out: Path, config: DictConfig, words: Sequence[str]) -> Summary:
    said = False
    while True:
        try:
            return tuner.run(config, words, command(out))
        except RunBusy:
            if not said:
                print(f"{out}: another process is at work on this trial; waiting for its end", flush=True)
            said = True
        time.sleep(LOOK_S)


def record_death(out: Path, reason: str, status: str = "failed") -> None:
    """Write the `summary.json` of a run that could not do so itself; one that is there is left as it is.

    How far the run got stands in what it has logged.
    """
    if not (out / SUMMARY).exists():
        out.mkdir(parents=True, exist_ok=True)
        summary = Summary(status, str(out), **reached(out))
        summary.reason, summary.resume, summary.log_tail = reason, command(out), tail(out)
        write_summary(summary)


def link_log(out: Path, log: Path) -> None:
    """Let the run folder name the log of the process that ran it last; relative, so that the sweep folder may move."""
    link = out / LOG
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(log, out))


def logs_of(out: Path) -> list[Path]:
    """What a trial has printed: as a run, and as a process, if it did not finish."""
    return [file for file in (out / "run.log", out / LOG) if file.exists()]


def summary_of(out: Path) -> dict[str, Any] | None:
    """`summary.json` of a run folder; None before there is one."""
    try:
        summary: dict[str, Any] = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{out / SUMMARY}: damaged: {error}; remove it to run the trial again") from error
    return summary
