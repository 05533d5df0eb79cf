"""A run that is stopped, killed or asked for again: what it says, what it leaves, and that it continues bit by bit."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

STEPS = 24
SAME_IN_ALL_RUNS = ("step", "tokens", "train/loss", "train/lr", "train/grad_norm", "val/loss", "val/perplexity")
"""Fields of metrics.jsonl that are no measurement of time or memory."""


@pytest.fixture(scope="module")
def words(shell: Any) -> list[str]:
    numbers = ["train.val_every_steps=8", "train.num_samples=0", "train.num_threads=1", "peft.lora_dropout=0.1"]
    return ["model=tiny", *shell.data, f"train.max_steps={STEPS}", *numbers]


@pytest.fixture(scope="module")
def whole(shell: Any, words: list[str]) -> str:
    """A run that nobody disturbed; all others here must end like it."""
    done = shell.inside(*words, "logger=none", "out=whole")
    assert (done.code, done.err) == (0, "")
    return "whole"


def learned(shell: Any, run: str) -> list[dict[str, Any]]:
    return [{key: row[key] for key in SAME_IN_ALL_RUNS if key in row} for row in shell.rows(run)]


def summary(shell: Any, run: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((shell.folder / run / "summary.json").read_text())
    return loaded


def assert_equal_runs(shell: Any, run: str, whole: str) -> None:
    """The same losses line by line, and the same adapter bit by bit."""
    assert learned(shell, run) == learned(shell, whole)
    mine, theirs = (load_file(shell.folder / name / "adapter" / "adapter_model.safetensors") for name in (run, whole))
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)
    same = ("status", "objective", "val_loss_before", "val_loss", "train_loss", "steps", "tokens")
    assert {key: summary(shell, run)[key] for key in same} == {key: summary(shell, whole)[key] for key in same}


def mlflow_status(shell: Any, run: str) -> str:
    from mlflow import MlflowClient

    from tuner.logging.mlflow_store import silent

    with silent():
        found = MlflowClient(f"sqlite:///{shell.folder / 'mlflow.db'}").get_run(summary(shell, run)["mlflow_run_id"])
    return str(found.info.status)


def resume_line(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("resume: ")]
    return line.removeprefix("resume: ")


@pytest.mark.slow
def test_two_runs_of_one_configuration_are_equal(shell: Any, words: list[str], whole: str) -> None:
    done = shell.inside(*words, "logger=none", "out=again")
    assert done.code == 0
    assert_equal_runs(shell, "again", whole)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_printed_command_continues_bitwise(shell: Any, words: list[str], whole: str) -> None:
    process = shell.start(*words, "out='my (stopped), run'")
    done = shell.at_step(process, "my (stopped), run", 5, [signal.SIGINT])
    assert done.code == 130
    folder = shell.folder / "my (stopped), run"
    told = summary(shell, "my (stopped), run")
    (saved,) = (folder / "checkpoints").iterdir()
    assert 5 <= told["steps"] < STEPS
    assert saved.name == f"step-{told['steps']:08d}"
    blank, answer, first, second = done.err.splitlines()
    assert (blank, answer) == ("", "stopping: the step is finished and saved first; a second Ctrl-C stops at once")
    assert first == f"stopped by SIGINT after step {told['steps']}, saved in {saved}"
    assert second.startswith("resume: python -m tuner model=tiny ")
    assert (told["status"], told["reason"]) == ("stopped", first)
    assert told["val_loss_before"] is not None
    assert mlflow_status(shell, "my (stopped), run") == "KILLED"
    assert str(saved.parent) in done.out
    assert resume_line(done.err) in done.out
    assert resume_line(done.err) in (folder / "run.log").read_text()

    resumed = shell.line(resume_line(done.err))
    assert (resumed.code, resumed.err) == (0, "")
    assert f"resumed at step {told['steps']} of {STEPS}" in resumed.out
    assert_equal_runs(shell, "my (stopped), run", whole)
    assert mlflow_status(shell, "my (stopped), run") == "FINISHED"
    assert summary(shell, "my (stopped), run")["mlflow_run_id"] == told["mlflow_run_id"]


@pytest.mark.slow
def test_a_schedulers_signal_is_like_ctrl_c(shell: Any, words: list[str], whole: str) -> None:
    process = shell.start(*words, "logger=none", "out=terminated")
    done = shell.at_step(process, "terminated", 3, [signal.SIGTERM] * 2)  # as SLURM does at a time limit
    assert done.code == 130
    assert "\nstopped by SIGTERM after step " in done.err
    assert shell.line(resume_line(done.err)).code == 0
    assert_equal_runs(shell, "terminated", whole)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint(shell: Any, words: list[str], whole: str) -> None:
    process = shell.start(*words, "checkpoint.every_steps=2", "logger=none", "out=twice")
    done = shell.at_step(process, "twice", 3, [signal.SIGINT] * 2)
    assert done.code == 130
    assert "Traceback" not in done.err
    assert "resume: python -m tuner" in done.err
    told = summary(shell, "twice")
    assert told["status"] == "stopped"
    assert shell.line(resume_line(done.err)).code == 0
    assert_equal_runs(shell, "twice", whole)


@pytest.mark.slow
def test_a_killed_run_has_no_end_and_continues_from_its_checkpoint(shell: Any, words: list[str], whole: str) -> None:
    again = [*words, "logger=none", "out=killed", "checkpoint.every_steps=5"]
    done = shell.at_step(shell.start(*again), "killed", 7, [signal.SIGKILL])
    assert done.code == -signal.SIGKILL
    assert not (shell.folder / "killed" / "summary.json").exists()
    resumed = shell(*again)
    assert resumed.code == 0
    assert "resumed at step " in resumed.out
    assert_equal_runs(shell, "killed", whole)


@pytest.mark.slow
def test_a_killed_run_of_packed_rows_ends_like_one_that_was_not_killed(shell: Any, words: list[str]) -> None:
    packed = [*words, "logger=none", "data.packing=pack", "train.batch_size=2", "checkpoint.every_steps=5"]
    assert shell.inside(*packed, "out=packed").code == 0
    assert shell.at_step(shell.start(*packed, "out=cut"), "cut", 7, [signal.SIGKILL]).code == -signal.SIGKILL
    resumed = shell(*packed, "out=cut")
    assert (resumed.code, "resumed at step " in resumed.out) == (0, True)
    assert_equal_runs(shell, "cut", "packed")


@pytest.mark.slow
def test_a_run_killed_before_any_checkpoint_begins_anew(shell: Any, words: list[str], whole: str) -> None:
    again = [*words, "logger=none", "out=early"]
    assert shell.at_step(shell.start(*again), "early", 2, [signal.SIGKILL]).code == -signal.SIGKILL
    assert shell(*again).code == 0
    assert_equal_runs(shell, "early", whole)


def test_a_finished_run_is_shown_and_not_trained(shell: Any, words: list[str], whole: str) -> None:
    folder = shell.folder / whole
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = shell.inside(*words, "logger=none", "out=whole")
    assert (done.code, done.err) == (0, "")
    assert '"status": "finished"' in done.out
    assert "is finished already" in done.out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_another_learning_rate_is_refused_by_name(shell: Any, words: list[str], whole: str) -> None:
    done = shell.inside(*words, "logger=none", "out=whole", "optimizer.lr=0.5", "seed=3")
    assert done.code == 2
    assert done.err.startswith(f"error: {shell.folder / whole} holds another run: ")
    assert "optimizer.lr was 0.001 and is 0.5, seed was 0 and is 3" in done.err
    assert done.err.count("\n") == 1
    never = shell.inside(*words, "logger=none", "out=whole", "checkpoint.resume=never")
    assert (never.code, "checkpoint.resume=never" in never.err) == (2, True)


@pytest.mark.slow
def test_a_finished_run_that_is_asked_for_more_continues(shell: Any, words: list[str], whole: str) -> None:
    shorter = [word for word in words if "max_steps" not in word]
    assert shell(*shorter, "logger=none", "out=longer", "train.max_steps=6").code == 0
    process = shell.start(*shorter, "logger=none", "out=longer", "train.max_steps=200")
    assert shell.at_step(process, "longer", 9, [signal.SIGKILL]).code == -signal.SIGKILL
    # Killed on its way: it is not the finished run of 6 steps that it was.
    more = shell(*shorter, "logger=none", "out=longer", "train.max_steps=200")
    assert (more.code, "resumed at step 6 of 200" in more.out) == (0, True)
    assert summary(shell, "longer")["steps"] == 200
    trained = [row["step"] for row in shell.rows("longer") if "train/loss" in row]
    assert trained == list(range(1, 201))


def test_a_run_stopped_while_it_wrote_its_results_writes_them(shell: Any, words: list[str], whole: str) -> None:
    folder = shell.folder / "no results"
    shutil.copytree(shell.folder / whole, folder)
    shutil.rmtree(folder / "adapter")
    (folder / "summary.json").unlink()
    frozen = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(frozen.replace(str(shell.folder / whole), str(folder)))
    assert shell.inside(*words, "logger=none", "out=no results").code == 0
    assert_equal_runs(shell, "no results", whole)


@pytest.mark.slow
def test_two_runs_that_start_at_once_without_a_store_are_both_in_it(
    shell_in: Callable[[Path], Any], tmp_path: Path
) -> None:
    shell = shell_in(tmp_path)
    words = ["model=tiny", *shell.data, "train.max_steps=2", "train.num_samples=0"]
    processes = [shell.start(*words, f"out={name}") for name in ("one", "two")]
    ended: Mapping[str, Any] = {
        name: shell.end(process) for name, process in zip(("one", "two"), processes, strict=True)
    }
    assert [(done.code, done.err) for done in ended.values()] == [(0, "")] * 2
    assert all("warning" not in done.out for done in ended.values())
    assert [mlflow_status(shell, name) for name in ended] == ["FINISHED"] * 2
    assert summary(shell, "one")["mlflow_run_id"] != summary(shell, "two")["mlflow_run_id"]
