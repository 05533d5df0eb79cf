"""Whatever ends a run, its folder says so: what it failed by, what stopped it, or that its process is gone."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

import tuner.fit
import tuner.train

STEPS = 6

PATCHED = """
import sys, time, tuner.train
def broken(*words, **more):
    {what}
tuner.train.build_model = broken
from tuner.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def words(shell: Any) -> list[str]:
    numbers = [f"train.max_steps={STEPS}", "train.num_samples=0", "train.num_threads=1", "checkpoint.every_steps=2"]
    return ["model=tiny", *shell.data, "logger=none", *numbers]


def summary(shell: Any, run: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((shell.folder / run / "summary.json").read_text())
    return loaded


def files(shell: Any, run: str) -> set[str]:
    return {path.name for path in (shell.folder / run).iterdir()}


def patched(shell: Any, what: str, *words: str) -> subprocess.Popen[str]:
    """The command, in which `what` happens where the model is made."""
    return subprocess.Popen(
        [sys.executable, "-c", PATCHED.format(what=what), *words],
        cwd=shell.folder,
        env=shell.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def raises(error: BaseException) -> Callable[..., Any]:
    def broken(*words: Any, **more: Any) -> Any:
        raise error

    return broken


def inside(shell: Any, *words: str) -> Any:
    """As `shell.inside`, of a command that ends with a bug's traceback."""
    with pytest.raises((ArithmeticError, RuntimeError)) as caught:
        shell.inside(*words)
    return caught.value


def test_a_bug_before_the_first_step_is_told_and_the_same_folder_begins_anew(
    shell: Any, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, error = "anew", ArithmeticError("too much")
    with monkeypatch.context() as patch:
        patch.setattr(tuner.train, "build_model", raises(error))
        assert inside(shell, *words, f"out={run}") is error
    assert files(shell, run) == {"config.yaml", "overrides.yaml", "summary.json", "run.log"}
    told = summary(shell, run)
    assert (told["status"], told["reason"]) == ("failed", "ArithmeticError: too much")
    log = (shell.folder / run / "run.log").read_text().splitlines()
    assert told["log_tail"] == log[-20:]
    assert log[0] == "Traceback (most recent call last):"
    assert log[-1] == "ArithmeticError: too much"
    assert any("in prepare" in line for line in log)
    assert told["resume"].startswith("python -m tuner model=tiny ")
    # Another configuration too: nothing of the first one was trained.
    done = shell.inside(*words, f"out={run}", "optimizer.lr=0.01")
    assert (done.code, done.err) == (0, "")
    told = summary(shell, run)
    assert (told["status"], told["steps"], told["total_steps"]) == ("finished", STEPS, STEPS)
    assert (told["reason"], told["resume"], told["log_tail"]) == (None, None, [])


@pytest.mark.slow
def test_a_bug_while_training_is_told_with_the_last_lines(
    shell: Any, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tuner.fit.record

    def broken(told: Any, state: Any, *more: Any) -> None:
        record(told, state, *more)
        if state.step == 4:
            raise RuntimeError("a bug \x1b[2J in\nthe fourth step")

    with monkeypatch.context() as patch:
        patch.setattr(tuner.fit, "record", broken)
        inside(shell, *words, "out=midway")
    told = summary(shell, "midway")
    assert (told["status"], told["steps"]) == ("failed", 4)
    log = (shell.folder / "midway" / "run.log").read_text().splitlines()
    assert told["log_tail"] == log[-20:]
    assert log[-2:] == ["RuntimeError: a bug \\x1b[2J in", "the fourth step"]
    assert any(line.startswith("step 4/6  loss ") for line in log[-20:])
    assert not (shell.folder / "midway" / "heartbeat.json").exists()

    # Continued, and broken again before it is restored: the checkpoints stay, and how far it was.
    with monkeypatch.context() as patch:
        patch.setattr(tuner.train, "build_model", raises(ArithmeticError("too much")))
        inside(shell, *words, "out=midway")
    again = summary(shell, "midway")
    assert (again["status"], again["reason"], again["steps"]) == ("failed", "ArithmeticError: too much", 4)
    kept = ("train_loss", "val_loss_before", "tokens", "trainable_params", "total_steps")
    assert {name: again[name] for name in kept} == {name: told[name] for name in kept}
    assert again["log_tail"][-1] == "ArithmeticError: too much"
    assert (shell.folder / "midway" / "checkpoints" / "step-00000002").is_dir()
    done = shell.inside(*words, "out=midway")
    assert (done.code, f"resumed at step 2 of {STEPS}" in done.out) == (0, True)


@pytest.mark.slow
def test_a_wrong_input_leaves_the_end_of_a_stopped_run_as_it_was(shell: Any, words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner.train, "build_model", raises(KeyboardInterrupt()))
        done = shell.inside(*words, "out=wrong")
    assert (done.code, done.out) == (130, "")
    told = summary(shell, "wrong")
    assert (told["status"], told["steps"], told["log_tail"]) == ("stopped", 0, [])
    assert told["reason"] == "stopped by Ctrl-C while the data and the model were prepared"
    assert done.err == f"{told['reason']}\nresume: {told['resume']}\n"
    before = {path: path.stat().st_mtime_ns for path in (shell.folder / "wrong").iterdir()}
    done = shell.inside(*words, "data.max_seq_len=4", "out=wrong")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert {path: path.stat().st_mtime_ns for path in (shell.folder / "wrong").iterdir()} == before
    assert shell.inside(*shlex.split(told["resume"])[3:]).code == 0
    assert summary(shell, "wrong")["status"] == "finished"


@pytest.mark.slow
def test_a_killed_run_that_cannot_be_continued_has_failed(shell: Any, words: list[str]) -> None:
    """Its folder did not say how it ended, so what is found out first is told."""
    assert shell.inside(*words, "out=damaged").code == 0
    folder = shell.folder / "damaged"
    (folder / "summary.json").unlink()
    for file in folder.glob("checkpoints/*/training.pt"):
        file.write_bytes(b"garbled")
    done = shell.inside(*words, "out=damaged")
    assert (done.code, done.err.count("\n"), "damaged" in done.err) == (2, 1, True)
    told = summary(shell, "damaged")
    assert (told["status"], told["steps"]) == ("failed", STEPS)
    assert told["reason"] == f"CheckpointError: {done.err.removeprefix('error: ').rstrip()}"
    assert told["log_tail"][-1] == done.err.rstrip()
    assert told["train_loss"] == [row["train/loss"] for row in shell.rows("damaged") if "train/loss" in row][-1]


@pytest.mark.slow
def test_a_process_that_dies_on_a_bug_prints_its_traceback_once(shell: Any, words: list[str]) -> None:
    out, err = patched(shell, "raise ArithmeticError('too much')", *words, "out=process").communicate(timeout=120)
    assert (out, err.count("Traceback"), err.splitlines()[-1]) == ("", 1, "ArithmeticError: too much")
    assert summary(shell, "process")["reason"] == "ArithmeticError: too much"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_stops_it(shell: Any, words: list[str], number: signal.Signals) -> None:
    run = f"early-{number.name}"
    process = patched(shell, "time.sleep(100)", *words, f"out={run}")
    until((shell.folder / run / "heartbeat.json").exists, process)
    time.sleep(0.5)  # it is preparing
    for _ in range(1 if number == signal.SIGINT else 3):  # a scheduler repeats itself
        process.send_signal(number)
        time.sleep(0.01)
    done = shell.end(process)
    assert done.code == 130
    told = summary(shell, run)
    by = "Ctrl-C" if number == signal.SIGINT else number.name
    assert told["status"] == "stopped"
    assert done.err.splitlines() == [
        f"stopped by {by} while the data and the model were prepared",
        f"resume: {told['resume']}",
    ]
    assert files(shell, run) == {"config.yaml", "overrides.yaml", "summary.json"}


def listed(shell: Any, run: str) -> tuple[list[str], str]:
    """What `ls runs` says of a run: the cells of its line, and all of it."""
    done = shell.inside("ls", "runs", ".")
    assert (done.code, done.err) == (0, "")
    (line,) = [line for line in done.out.splitlines() if line.endswith(f"  {run}")]
    return line.split(), done.out


@pytest.mark.slow
def test_a_kill_is_seen_and_the_listed_command_goes_on(shell: Any, words: list[str]) -> None:
    """Killed while it prepares, while it trains, and while it prepares to go on."""
    process = patched(shell, "time.sleep(100)", *words, "out=early")
    until((shell.folder / "early" / "heartbeat.json").exists, process)
    assert listed(shell, "early")[0][:2] == ["running", "0/?"]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert files(shell, "early") == {"heartbeat.json", ".lock"}
    assert listed(shell, "early")[0][:2] == ["killed", "0/?"]

    more = [word for word in words if "max_steps" not in word] + ["train.max_steps=100000", "out=early"]
    process = shell.start(*more)
    done = shell.at_step(process, "early", 4, [signal.SIGSTOP, signal.SIGKILL])
    assert done.code == -signal.SIGKILL
    cells, text = listed(shell, "early")
    logged = max(int(row["step"]) for row in shell.rows("early"))
    saved = max(path.name for path in (shell.folder / "early" / "checkpoints").glob("step-*"))
    assert cells[0] == "killed"
    assert int(cells[1].removesuffix("/100000")) in (logged, logged + 1), "a step may be done and not logged yet"
    assert f"newest checkpoint {saved}\n" in text
    command = next(line for line in text.splitlines() if line.endswith(f"out={shell.folder / 'early'}"))
    assert shlex.split(command) == ["resume:", "python", "-m", "tuner", *more[:-1], f"out={shell.folder / 'early'}"]

    process = patched(shell, "time.sleep(100)", *more)
    until(lambda: listed(shell, "early")[0][0] == "running", process)
    assert int(listed(shell, "early")[0][1].partition("/")[0]) == logged
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert listed(shell, "early")[0][0] == "killed"

    process = shell.start(*shlex.split(command)[4:])
    until(lambda: max(row["step"] for row in shell.rows("early")) > logged, process)
    process.send_signal(signal.SIGTERM)
    done = shell.end(process)
    assert (done.code, "resumed at step " in done.out) == (130, True)
    assert listed(shell, "early")[0][0] == "stopped"
    assert not {"heartbeat.json", ".lock"} & files(shell, "early")


def in_mlflow(shell: Any, run: str) -> tuple[str, str, dict[str, str]]:
    """Id, status and tags."""
    from mlflow import MlflowClient

    from tuner.logging.mlflow_run import MlflowRecord
    from tuner.logging.mlflow_store import silent

    record = MlflowRecord.read(shell.folder / run)
    assert record is not None
    assert record.run_id is not None
    with silent():
        found = MlflowClient(record.tracking_uri).get_run(record.run_id)
    return record.run_id, str(found.info.status), dict(found.data.tags)


@pytest.mark.slow
def test_mlflow_agrees_with_the_folder_whatever_ends_the_run(shell: Any, words: list[str]) -> None:
    tracked = [word for word in words if word != "logger=none" and "max_steps" not in word]
    tracked += ["train.max_steps=100000", "out=tracked"]
    record = shell.folder / "tracked" / "mlflow.json"
    process = shell.start(*tracked)
    until(lambda: record.exists() and json.loads(record.read_text())["run_id"] is not None, process)
    assert shell.at_step(process, "tracked", 4, [signal.SIGKILL]).code == -signal.SIGKILL
    run_id, status, _ = in_mlflow(shell, "tracked")
    assert status == "RUNNING", "the process could not say so"
    done = shell.inside("sync", "tracked")
    assert (done.code, "it was killed (process " in done.out) == (0, True)
    assert in_mlflow(shell, "tracked")[:2] == (run_id, "KILLED")

    ends: list[tuple[str, BaseException, str, str]] = [
        ("build_model", ArithmeticError("too much"), "failed", "FAILED"),
        ("build_model", KeyboardInterrupt("SIGTERM"), "stopped", "KILLED"),
        ("fit", RuntimeError("midway"), "failed", "FAILED"),
    ]
    for function, error, state, status in ends:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuner.train, function, raises(error))
            if isinstance(error, KeyboardInterrupt):
                assert shell.inside(*tracked).code == 130
            else:
                assert inside(shell, *tracked) is error
        told = summary(shell, "tracked")
        assert (told["status"], told["mlflow_run_id"]) == (state, run_id)
        found = in_mlflow(shell, "tracked")
        assert found[:2] == (run_id, status)
        assert (found[2]["status"], found[2]["reason"]) == (state, told["reason"])

    process = shell.start(*tracked)
    logged = max(row["step"] for row in shell.rows("tracked"))
    assert shell.at_step(process, "tracked", int(logged) + 1, [signal.SIGTERM]).code == 130
    assert summary(shell, "tracked")["status"] == "stopped"
    found = in_mlflow(shell, "tracked")
    assert found[:2] == (run_id, "KILLED")
    assert found[2]["reason"] == summary(shell, "tracked")["reason"]
