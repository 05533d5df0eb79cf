"""What the trials found: rows from their folders, the best first, and `results.csv`."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sweeper.folder import Entry, SweepFolder
from sweeper.results import NUMBERS, Row, best_of, rows_of, write_results
from sweeper.trial import record_death
from tuner.logging.heartbeat import Beat
from tuner.logging.process import machine_id, process_start
from tuner.types import Summary


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return SweepFolder(tmp_path)


def entry(name: str, illegal: str | None = None, **values: str) -> Entry:
    return Entry(name, [f"{key}={value}" for key, value in values.items()], values, illegal)


def ended(folder: SweepFolder, name: str, status: str, objective: Any, **more: Any) -> Entry:
    """A trial whose run has left a summary; what JSON has no number for stands there as a word, as runs write it."""
    out = folder.out(name)
    out.mkdir()
    summary = {**asdict(Summary(status, str(out))), "objective": objective, **more}
    (out / "summary.json").write_text(json.dumps(summary))
    return entry(name, seed=name)


def names(rows: list[Row]) -> list[str]:
    return [row.entry.id for row in rows]


# ---- the order ----


ORDERS = [
    ("val_loss", {"a": 3.0, "b": 1.0, "c": 2.0}, "bca"),
    ("train_loss", {"a": 3.0, "b": 1.0, "c": 2.0}, "bca"),
    ("seconds", {"a": 3.0, "b": 1.0, "c": 2.0}, "bca"),
    ("peak_memory_mib", {"a": 3.0, "b": 1.0, "c": 2.0}, "bca"),
    ("tokens_per_s", {"a": 3.0, "b": 1.0, "c": 2.0}, "acb"),
    ("val_loss", {"a": 1.0, "b": -1.0, "c": 0.0}, "bca"),
    ("val_loss", {"a": 1, "b": 0.5}, "ba"),
    # equal ones stay in the order they were asked for, those without a number come last
    ("val_loss", {"c": 1.0, "a": 1.0, "b": 1.0}, "cab"),
    ("tokens_per_s", {"c": 1.0, "a": 1.0, "b": 1.0}, "cab"),
    ("val_loss", {"a": "NaN", "b": 2.0, "c": None, "d": 1.0}, "dbac"),
    ("tokens_per_s", {"a": "NaN", "b": 2.0, "c": None, "d": 1.0}, "bdac"),
    ("val_loss", {"a": "Infinity", "b": "NaN", "c": 9.0, "d": "-Infinity"}, "dcab"),
]


@pytest.mark.parametrize(("objective", "found", "order"), ORDERS, ids=[f"{row[0]}-{row[1]}" for row in ORDERS])
def test_the_best_is_first(objective: str, found: dict[str, Any], order: str, folder: SweepFolder) -> None:
    entries = [ended(folder, name, "finished", number) for name, number in found.items()]
    rows = rows_of(folder, entries, objective)
    assert names(rows) == list(order)
    best = best_of(rows)
    assert best is not None
    assert best.entry.id == order[0]


def test_only_what_finished_is_compared(folder: SweepFolder) -> None:
    entries = [
        ended(folder, "failed", "failed", 0.1, reason="ValueError: half way"),
        entry("pending"),
        ended(folder, "stopped", "stopped", 0.2, reason="SIGTERM"),
        entry("illegal", "peft.lora_rank=999: larger than the matrix"),
        ended(folder, "worse", "finished", 3.0),
        ended(folder, "better", "finished", 2.0),
    ]
    rows = rows_of(folder, entries, "val_loss")
    assert names(rows) == ["better", "worse", "failed", "pending", "stopped", "illegal"]
    assert [row.status for row in rows] == ["finished", "finished", "failed", "pending", "stopped", "illegal"]
    assert rows[2].numbers["objective"] == 0.1, "known, and shown, though not compared"


def test_nothing_finished_nothing_is_best(folder: SweepFolder) -> None:
    assert best_of([]) is None
    entries = [entry("pending"), ended(folder, "failed", "failed", 0.1)]
    assert best_of(rows_of(folder, entries, "val_loss")) is None


@pytest.mark.parametrize(
    "number",
    [pytest.param(number) for number in ("NaN", None)],
)
def test_what_has_no_number_is_not_best(number: Any, folder: SweepFolder) -> None:
    assert best_of(rows_of(folder, [ended(folder, "only", "finished", number)], "val_loss")) is None


# ---- the rows ----


def test_a_row_is_what_the_run_left(folder: SweepFolder) -> None:
    more = {"val_loss": 1.5, "seconds": 12.25, "peak_memory_mib": 300.5, "trainable_params": 17920}
    (row,) = rows_of(folder, [ended(folder, "a", "finished", 1.5, **more)], "val_loss")
    assert row.numbers == {"objective": 1.5, **more}
    assert set(row.numbers) == set(NUMBERS)
    assert (row.out, row.reason) == (folder.path / "a", None)


def test_rows_of_trials_that_did_not_finish_say_why(folder: SweepFolder) -> None:
    record_death(folder.out("dead"), "killed, it left no result")
    entries = [
        entry("dead"),
        entry("pending"),
        entry("illegal", "a rule"),
        ended(folder, "stopped", "stopped", None, reason="SIGUSR2"),
        ended(folder, "full", "failed", None, reason="out of memory: step 1: full", peak_memory_mib=81000.0),
    ]
    rows = {row.entry.id: row for row in rows_of(folder, entries, "val_loss")}
    assert (rows["dead"].status, rows["dead"].reason) == ("failed", "killed, it left no result")
    assert (rows["pending"].status, rows["pending"].reason) == ("pending", None)
    assert (rows["illegal"].status, rows["illegal"].reason) == ("illegal", "a rule")
    assert (rows["stopped"].status, rows["stopped"].reason) == ("stopped", "SIGUSR2")
    assert (rows["full"].status, rows["full"].reason) == ("failed", "out of memory: step 1: full")
    assert rows["full"].numbers["peak_memory_mib"] == 81000.0
    for name in ("pending", "illegal"):
        assert set(rows[name].numbers) == set(NUMBERS)
        assert set(rows[name].numbers.values()) == {None}


def beat(out: Path, start: str | None) -> None:
    """The heartbeat of a process that began an hour after all else in the folder was written."""
    content = Beat("here", machine_id(), os.getpid(), str(start), time.time() + 3600, 1, 9, None, None)
    (out / "heartbeat.json").write_text(json.dumps(asdict(content)))


def test_a_trial_that_has_not_said_how_it_ended_runs_or_was_killed(folder: SweepFolder) -> None:
    """Also where an earlier process had stopped it."""
    entries = []
    for name, start in (("runs", process_start(os.getpid())), ("killed", "1")):
        entries += [entry(name), ended(folder, f"{name}-again", "stopped", None)]
        folder.out(name).mkdir()
        beat(folder.out(name), start)
        beat(folder.out(f"{name}-again"), start)
    rows = rows_of(folder, entries, "val_loss")
    assert [row.status for row in rows] == ["running", "running", "killed", "killed"]
    assert [row.reason for row in rows] == [None, None, *[f"process {os.getpid()} on here is gone"] * 2]


def test_a_recorded_death_says_how_far_it_got_and_what_was_logged_last(folder: SweepFolder) -> None:
    out = folder.out("dead")
    out.mkdir()
    rows = [
        {"step": 0, "time": 0.0, "tokens": 0, "val/loss": 3.0},
        {"step": 1, "time": 0.0, "tokens": 50, "train/loss": 2.0},
        {"step": 2, "time": 0.0, "tokens": 90, "train/loss": "NaN"},
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "run.log").write_text("".join(f"line {number}\n" for number in range(30)))
    record_death(out, "killed, it left no result")
    told = json.loads((out / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (told["status"], told["reason"]) == ("failed", "killed, it left no result")
    assert (told["steps"], told["tokens"], told["train_loss"], told["val_loss_before"]) == (2, 90, "NaN", 3.0)
    assert told["log_tail"] == [f"line {number}" for number in range(10, 30)]
    assert told["resume"] == f"python -m sweeper trial {out}"


def test_an_illegal_point_stays_illegal_whatever_lies_in_its_folder(folder: SweepFolder) -> None:
    ended(folder, "a", "finished", 1.0)
    (row,) = rows_of(folder, [entry("a", "a rule")], "val_loss")
    assert (row.status, row.numbers["objective"]) == ("illegal", None)


# ---- results.csv ----


COLUMNS = ["objective", "val_loss", "seconds", "peak_memory_mib", "trainable_params", "out", "reason"]
HARD = 'a, "quoted" [list]\nsecond line; ü'


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_results_hold_every_trial_and_read_back_as_written(folder: SweepFolder) -> None:
    entries = [
        ended(folder, "b", "finished", 0.1 + 0.2, val_loss=1e-17, seconds=12, trainable_params=17920),
        Entry("c", [], {"peft.lora_attn_modules": "[q_proj,v_proj]", "seed": HARD}, None),
        entry("d", HARD, seed="3"),
        ended(folder, "e", "finished", "NaN"),
    ]
    rows = rows_of(folder, entries, "val_loss")
    path = write_results(rows, folder)
    assert path == folder.path / "results.csv"
    table = read(path)
    assert list(table[0]) == ["trial", "status", "seed", "peft.lora_attn_modules", *COLUMNS]
    assert [row["trial"] for row in table] == ["b", "c", "d", "e"]
    by_name = {row["trial"]: row for row in table}
    assert float(by_name["b"]["objective"]) == 0.1 + 0.2, "to the last bit"
    assert float(by_name["b"]["val_loss"]) == 1e-17
    assert by_name["b"]["trainable_params"] == "17920"
    assert by_name["b"]["out"] == str(folder.path / "b")
    assert by_name["b"]["peft.lora_attn_modules"] == ""
    assert (by_name["c"]["seed"], by_name["c"]["peft.lora_attn_modules"]) == (HARD, "[q_proj,v_proj]")
    assert (by_name["d"]["status"], by_name["d"]["reason"], by_name["d"]["out"]) == ("illegal", HARD, "")
    assert math.isnan(float(by_name["e"]["objective"]))
    assert [by_name["c"][name] for name in NUMBERS] == [""] * len(NUMBERS)


def test_results_are_replaced_whole(folder: SweepFolder) -> None:
    first = ended(folder, "a", "finished", 1.0)
    write_results(rows_of(folder, [first, entry("b")], "val_loss"), folder)
    path = write_results(rows_of(folder, [first], "val_loss"), folder)
    assert [row["trial"] for row in read(path)] == ["a"]
    assert [file.name for file in folder.path.iterdir() if file.is_file()] == ["results.csv"]


def test_no_trials_leave_a_header(folder: SweepFolder) -> None:
    path = write_results(rows_of(folder, [], "val_loss"), folder)
    assert path.read_text().splitlines() == [",".join(["trial", "status", *COLUMNS])]
