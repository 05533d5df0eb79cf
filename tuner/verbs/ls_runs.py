"""`tuner ls runs`: run folders and what has become of each."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from tuner.errors import ConfigError
from tuner.logging.disk import CONFIG, OVERRIDES
from tuner.logging.header import in_few_words, resume_command
from tuner.logging.heartbeat import HEARTBEAT
from tuner.runs import RunState, clock_of, is_run, state_of

PLACES = ("outputs", "multirun")
"""Where run folders are unless a command says otherwise."""

NUMBERS = ("steps", "val_loss", "objective", "seconds", "ago")

NUM_ENDS = 5
"""Of how many of the newest runs that did not finish it is said why, and how they go on."""

SHOWN = ("model", "peft", "quantization", "train")
"""Of the configuration."""


@dataclass(frozen=True)
class Listed:
    """A run folder of the table.

    Attributes:
        out: as it is shown.
        state: where its run stands.
        model, method: a few words each, empty of a run that was killed before it could write its configuration.
        resume: the command that goes on with it.
    """

    out: Path
    state: RunState
    model: str
    method: str
    resume: str | None


def list_runs(folder: str | None = None) -> str:
    """A table of the run folders under `folder`, newest last, and of the last that did not finish why, and what next.

    Args:
        folder: searched with all that is under it; None for `outputs` and `multirun` here.

    Raises:
        ConfigError: there is no such folder.
    """
    places = [Path(place) for place in PLACES if Path(place).is_dir()] if folder is None else [Path(folder)]
    if folder is not None and not places[0].is_dir():
        raise ConfigError(f"ls runs {folder}: no such folder")
    unread: list[str] = []
    runs = sorted(_listed(places, unread), key=lambda run: run.state.since_s)
    if not runs:
        searched = " and ".join(map(str, places)) or " and ".join(f"{place} (not there)" for place in PLACES)
        return "\n".join([f"no run folders in {searched}", *unread])
    return "\n".join([*_table(runs, clock_of(places[0])), *_ends(runs), *unread])


def _listed(places: Sequence[Path], unread: list[str]) -> Iterator[Listed]:
    """Every run folder that can be read; of the others `unread` gets a line each."""
    for out in _found(places, unread):
        try:
            yield _read(out)
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:  # garbled, or just taken away
            unread.append(f"cannot be read: {out}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _found(places: Sequence[Path], unread: list[str]) -> Iterator[Path]:
    """Run folders; what is inside of one is not looked at, nor are hidden folders."""
    for place in places:
        for name, folders, files in os.walk(place, onerror=lambda error: unread.append(f"cannot be read: {error}")):
            folders[:] = [one for one in folders if not one.startswith(".")]
            if {CONFIG, HEARTBEAT} & {*files}:
                folders.clear()
                if is_run(Path(name)):
                    yield Path(name)


def _read(out: Path) -> Listed:
    state = state_of(out)
    if not (out / CONFIG).exists():
        return Listed(out, state, "", "", state.resume)
    text = (out / CONFIG).read_text(encoding="utf-8")
    config = _parsed("".join(block for name, block in _blocks(text) if name in SHOWN))
    resume = state.resume
    if resume is None and state.state != "finished" and (out / OVERRIDES).exists():  # of an earlier version
        words = _parsed((out / OVERRIDES).read_text(encoding="utf-8"))
        resume = resume_command(out.resolve(), _parsed(text), words)
    if state.total_steps is None:
        state = replace(state, total_steps=config["train"]["max_steps"])
    return Listed(out, state, *in_few_words(config), resume)


def _parsed(text: str) -> Any:
    # libyaml's loader, where PyYAML has it, takes a tenth of the time.
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text).get_single_data()


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """The top-level keys of a configuration, each with its text: parsing all of it takes five times as long."""
    starts = [*re.finditer(r"^(\w+):", text, re.MULTILINE)]
    ends = [*(match.start() for match in starts[1:]), len(text)]
    for match, end in zip(starts, ends, strict=True):
        yield match[1], text[match.start() : end]


def _table(runs: Sequence[Listed], now_s: float) -> list[str]:
    """A header and a line a run; an objective that is no validation loss has a column of its own."""
    rows = [_cells(run, now_s) for run in runs]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [{name: name for name in columns}, *rows]
    widths = {name: max(len(line[name]) for line in lines) for name in columns}
    padded = [
        [line[name].rjust(widths[name]) if name in NUMBERS else line[name].ljust(widths[name]) for name in columns]
        for line in lines
    ]
    return ["  ".join(cells).rstrip() for cells in padded]


def _cells(run: Listed, now_s: float) -> dict[str, str]:
    state = run.state
    another = state.objective is not None and state.objective != state.val_loss and not math.isnan(state.objective)
    return {
        "state": state.state,
        "steps": f"{state.steps}/{state.total_steps or '?'}",
        "val_loss": _number(state.val_loss, ".4f"),
        "objective": _number(state.objective, ".4g") if another else "",
        "seconds": _number(state.seconds, ".1f"),
        "model": run.model,
        "method": run.method,
        "ago": _duration(now_s - state.since_s),
        "folder": str(run.out),
    }


def _ends(runs: Sequence[Listed]) -> Iterator[str]:
    """Of the newest runs that did not finish: why, since when, what they have logged and saved, and what goes on."""
    for run in [run for run in runs if run.state.state not in ("running", "finished")][-NUM_ENDS:]:
        state = run.state
        since = datetime.fromtimestamp(state.since_s).isoformat(" ", "seconds")
        saved = sorted((run.out / "checkpoints").glob("step-*"))
        at = (
            f"step {state.steps}, newest checkpoint {saved[-1].name}" if saved else f"step {state.steps}, no checkpoint"
        )
        yield f"\n{state.state}  {run.out}  since {since}, {at}"
        yield f"  {(state.reason or '').partition(chr(10))[0]}".rstrip()
        if run.resume is not None:
            yield f"  resume: {run.resume}"


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def _duration(seconds: float) -> str:
    """In the largest unit of which there are two; the clocks of two machines may make it less than nothing."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
