"""What the trials found, read from their folders: rows in the order of the objective, and `results.csv`."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeper.folder import Entry, SweepFolder
from sweeper.plan import swept_keys
from sweeper.trial import summary_of
from tuner.runs import is_run, state_of

RESULTS = "results.csv"
NUMBERS = ("objective", "val_loss", "seconds", "peak_memory_mib", "trainable_params")
LARGER_IS_BETTER = ("tokens_per_s",)
"""Objectives of which the largest is the best; of all others it is the smallest."""


@dataclass(frozen=True)
class Row:
    """One trial of the comparison.

    Attributes:
        entry: what it is.
        status: `finished`, `failed`, `stopped` or `illegal`; of a trial that has not said how it ended `running`,
            `killed` (its process is gone, with the sweep) or, where none has begun it, `pending`.
        numbers: of its summary, by the names of `NUMBERS`; None where there is none.
        reason: why it did not finish.
        out: its run folder.
    """

    entry: Entry
    status: str
    numbers: dict[str, float | None]
    reason: str | None
    out: Path


def rows_of(folder: SweepFolder, entries: Iterable[Entry], objective: str) -> list[Row]:
    """All trials: the best first, then those without a number in the order they were asked for."""
    rows = [_row(folder, entry) for entry in entries]
    sign = -1.0 if objective in LARGER_IS_BETTER else 1.0

    def order(row: Row) -> tuple[bool, float]:
        value = row.numbers["objective"]
        return (False, sign * value) if value is not None and _is_ranked(row) else (True, 0.0)

    return sorted(rows, key=order)


def _is_ranked(row: Row) -> bool:
    value = row.numbers["objective"]
    return row.status == "finished" and value is not None and not math.isnan(value)


def best_of(rows: Sequence[Row]) -> Row | None:
    """The first row, if it finished with a number."""
    return rows[0] if rows and _is_ranked(rows[0]) else None


def write_results(rows: Sequence[Row], folder: SweepFolder) -> Path:
    """`results.csv`: trial, status, the swept keys, the numbers, why not, where."""
    keys = swept_keys(row.entry.values for row in rows)
    unfinished = folder.path / f".{RESULTS}"
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "status", *keys, *NUMBERS, "out", "reason"])
        for row in rows:
            values = [row.entry.values.get(key, "") for key in keys]
            numbers = ["" if row.numbers[name] is None else row.numbers[name] for name in NUMBERS]
            out = "" if row.status == "illegal" else str(row.out)
            writer.writerow([row.entry.id, row.status, *values, *numbers, out, row.reason or ""])
    return unfinished.replace(folder.path / RESULTS)


def _row(folder: SweepFolder, entry: Entry) -> Row:
    out = folder.out(entry.id)
    nothing: dict[str, float | None] = dict.fromkeys(NUMBERS)
    if entry.illegal is not None:
        return Row(entry, "illegal", nothing, entry.illegal, out)
    summary = summary_of(out)
    state = state_of(out) if is_run(out) else None
    if state is not None and not state.told and state.state != "unknown":  # an earlier process's summary is history
        return Row(entry, state.state, nothing, state.reason, out)
    if summary is None:
        return Row(entry, "pending", nothing, None, out)
    numbers = {name: _number(summary.get(name)) for name in NUMBERS}
    return Row(entry, summary["status"], numbers, summary.get("reason"), out)


def _number(value: Any) -> float | None:
    """A number of `summary.json`, where what JSON has no number for is a word."""
    return float(value) if isinstance(value, str) else value
