"""Runs over data that is cached, prepared in several processes or streamed: the same numbers, also after a kill."""

from __future__ import annotations

import json
import shutil
import signal
from typing import Any

import pytest
from safetensors.torch import load_file

SAME_IN_ALL_RUNS = ("step", "tokens", "train/loss", "train/lr", "train/grad_norm", "val/loss", "val/perplexity")


@pytest.fixture(scope="module")
def words(shell: Any) -> list[str]:
    numbers = ["train.val_every_steps=8", "train.num_samples=0", "train.num_threads=1", "train.max_steps=20"]
    return ["model=tiny", *shell.data, *numbers, "logger=none", "data.cache_dir=prepared"]


@pytest.fixture(scope="module")
def streaming(words: list[str]) -> list[str]:
    """More than one epoch of the 120 rows."""
    return [*words, "train.max_steps=30", "data.streaming=true", "data.shuffle_buffer=40"]


def learned(shell: Any, run: str) -> list[dict[str, Any]]:
    return [{key: row[key] for key in SAME_IN_ALL_RUNS if key in row} for row in shell.rows(run)]


def assert_equal_runs(shell: Any, run: str, whole: str) -> None:
    assert learned(shell, run) == learned(shell, whole)
    mine, theirs = (load_file(shell.folder / name / "adapter" / "adapter_model.safetensors") for name in (run, whole))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)


@pytest.mark.slow
def test_cache_and_processes_change_no_number(shell: Any, words: list[str]) -> None:
    assert shell.inside(*words, "out=first").code == 0
    (entry,) = [path for path in (shell.folder / "prepared").iterdir() if path.is_dir()]
    assert shell.inside(*words, "out=found").code == 0
    assert shell.inside(*words, "data.workers=2", "data.cache=false", "out=without").code == 0
    (entry / "tokens.bin").write_bytes(b"")
    again = shell.inside(*words, "out=again")
    assert (again.code, again.err) == (0, "")
    assert "tokens.bin is damaged; it is prepared again" in " ".join(again.out.split())
    shutil.rmtree(shell.folder / "prepared")
    assert shell.inside(*words, "out=deleted").code == 0
    for run in ("found", "without", "again", "deleted"):
        assert_equal_runs(shell, run, "first")


@pytest.mark.slow
def test_a_run_continues_where_the_cache_was_deleted(shell: Any, words: list[str]) -> None:
    shorter = [word for word in words if "max_steps" not in word]
    assert shell.inside(*words, "out=longer").code == 0
    assert shell.inside(*shorter, "schedule=constant", "train.max_steps=5", "out=stopped").code == 0
    shutil.rmtree(shell.folder / "prepared")
    more = [*shorter, "schedule=constant", "train.max_steps=20", "data.workers=2"]
    assert shell.inside(*more, "out=stopped").code == 0
    assert shell.inside(*more, "out=at once").code == 0
    rows = [row for row in learned(shell, "stopped") if "train/loss" in row]
    assert rows == [row for row in learned(shell, "at once") if "train/loss" in row]


def test_rows_that_are_cut_to_nothing_are_said(shell: Any, words: list[str]) -> None:
    rows = [{"instruction": "long " * 100 * (i % 3 == 0), "input": str(i), "output": f"It is {i}."} for i in range(60)]
    (shell.folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = shell.inside(*words, "data.path=long.jsonl", "data.max_seq_len=400", "train.max_steps=1", "out=cut")
    assert (done.code, done.err) == (0, "")
    assert "alpaca: samples left out: 20; cut at data.max_seq_len=400 tokens" in " ".join(done.out.split())


def test_streaming_is_refused_without_a_number_of_steps(shell: Any, streaming: list[str]) -> None:
    done = shell.inside(*streaming, "train.max_steps=null", "train.epochs=1", "data.max_samples=5", "out=endless")
    assert done.code == 2
    assert "data.streaming=True train.max_steps=None: nobody knows how long an epoch is" in done.err
    assert "data.streaming=True data.max_samples=5" in done.err
    assert not (shell.folder / "endless").exists()


@pytest.fixture(scope="module")
def whole(shell: Any, streaming: list[str]) -> str:
    done = shell.inside(*streaming, "out=whole")
    assert (done.code, done.err) == (0, "")
    assert "read in this process: " in done.out
    return "whole"


@pytest.mark.slow
def test_streaming_writes_no_prepared_data_and_learns(shell: Any, streaming: list[str], whole: str) -> None:
    assert shell.inside(*streaming, "data.cache_dir=elsewhere", "out=streamed").code == 0
    assert not (shell.folder / "elsewhere").exists()
    assert_equal_runs(shell, "streamed", whole)
    losses = [row["val/loss"] for row in shell.rows(whole) if "val/loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_killed_streaming_run_continues_at_the_exact_sample(shell: Any, streaming: list[str], whole: str) -> None:
    again = [*streaming, "checkpoint.every_steps=4", "out=killed"]
    done = shell.at_step(shell.start(*again), "killed", 18, [signal.SIGKILL])  # in the second epoch
    assert done.code == -signal.SIGKILL
    resumed = shell(*again)
    assert resumed.code == 0
    assert "resumed at step " in resumed.out
    assert_equal_runs(shell, "killed", whole)
