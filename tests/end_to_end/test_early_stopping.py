"""A run whose validation loss no longer falls ends as a finished one, and so it does after a stop or a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuner.measure import Speed

SAME = ("step", "tokens", "train/loss", "train/lr", "train/grad_norm", "val/loss", "val/perplexity")
"""Fields of metrics.jsonl that are no measurement of time or memory."""


@pytest.fixture(scope="module")
def words(shell: Any) -> list[str]:
    """Nothing is an improvement of 5 nats: the first evaluation stays the best, and the third ends the run."""
    early = ["train.early_stopping_patience=2", "train.early_stopping_min_delta=5"]
    numbers = ["train.max_steps=24", "train.val_every_steps=3", "train.num_samples=0", "train.num_threads=1"]
    return ["model=tiny", *shell.data, *numbers, *early, "logger=none", "peft.lora_dropout=0.1"]


@pytest.fixture(scope="module")
def early(shell: Any, words: list[str]) -> Path:
    """A run that nobody disturbed."""
    done = shell.inside(*words, "out=early")
    assert (done.code, done.err) == (0, "")
    assert told(shell.folder / "early")["reason"] in done.out
    return Path(shell.folder / "early")


def told(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return loaded


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in SAME if key in line} for line in lines]


def assert_equal_runs(folder: Path, whole: Path) -> None:
    assert rows(folder) == rows(whole)
    mine, theirs = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (folder, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    same = ("status", "reason", "objective", "val_loss", "best_val_loss", "best_step", "train_loss", "steps", "tokens")
    assert {key: told(folder)[key] for key in same} == {key: told(whole)[key] for key in same}


def test_it_is_finished_with_its_results_and_a_reason(early: Path) -> None:
    summary = told(early)
    losses = {row["step"]: row["val/loss"] for row in rows(early) if "val/loss" in row}
    assert list(losses) == [0, 3, 6, 9]
    assert (summary["status"], summary["steps"]) == ("finished", 9)
    assert summary["objective"] == summary["val_loss"] == losses[9]
    del losses[0]  # of the untrained model
    assert (summary["best_val_loss"], summary["best_step"]) == min((loss, step) for step, loss in losses.items())
    assert summary["reason"] == (
        f"early stopping at step 9: validation loss has not fallen by more than 5 below {losses[3]:.4f} (step 3)"
        " in 2 evaluations"
    )
    assert [folder.name for folder in (early / "checkpoints").iterdir()] == ["step-00000009"]


def test_asked_for_again_it_is_shown_and_not_trained(shell: Any, words: list[str], early: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in early.rglob("*")}
    done = shell.inside(*words, "out=early")
    assert (done.code, done.err) == (0, "")
    assert "is finished already" in done.out
    assert "early stopping at step 9" in done.out
    assert {path: path.stat().st_mtime_ns for path in early.rglob("*")} == before


@pytest.mark.slow
def test_stopped_on_its_way_it_ends_at_the_same_step(shell: Any, words: list[str], early: Path) -> None:
    add, steps = Speed.add, []

    def counted(speed: Speed, tokens: int, seconds: float) -> None:
        add(speed, tokens, seconds)
        steps.append(tokens)
        if len(steps) == 7:  # between the second evaluation and the third
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Speed, "add", counted)
        assert shell.inside(*words, "out=stopped").code == 130
    assert (told(shell.folder / "stopped")["steps"], told(shell.folder / "stopped")["best_step"]) == (7, 6)
    done = shell.inside(*words, "out=stopped")
    assert (done.code, "resumed at step 7 of 24" in done.out) == (0, True)
    assert_equal_runs(shell.folder / "stopped", early)


def test_killed_before_its_results_were_written_it_writes_them(shell: Any, words: list[str], early: Path) -> None:
    folder = shell.folder / "no results"
    shutil.copytree(early, folder)
    shutil.rmtree(folder / "adapter")
    (folder / "summary.json").unlink()
    frozen = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(frozen.replace(str(early), str(folder)))
    done = shell.inside(*words, "out=no results")
    assert (done.code, "resumed at step 9 of 24" in done.out) == (0, True)
    assert_equal_runs(folder, early)


def test_a_longer_run_would_have_ended_there_too(shell: Any, words: list[str], early: Path) -> None:
    shutil.copytree(early, shell.folder / "longer")
    frozen = (shell.folder / "longer" / "config.yaml").read_text()
    (shell.folder / "longer" / "config.yaml").write_text(frozen.replace(str(early), str(shell.folder / "longer")))
    done = shell.inside(*words, "train.max_steps=40", "out=longer")
    assert (done.code, told(shell.folder / "longer")["steps"]) == (0, 9)
    assert "early stopping at step 9" in told(shell.folder / "longer")["reason"]


def test_with_more_patience_another_run_goes_on_from_it(shell: Any, words: list[str], early: Path) -> None:
    begun = shell.inside(*words, "train.early_stopping_patience=4", f"checkpoint.resume={early}", "out=patient")
    assert (begun.code, begun.err) == (0, "")
    assert "at step 9 of 24" in begun.out
    summary = told(shell.folder / "patient")
    assert summary["steps"] == 14  # evaluated at 12 and, as an epoch ends there, at 14
    assert summary["reason"].startswith(
        "early stopping at step 14: validation loss has not fallen by more than 5 below "
    )
    assert summary["reason"].endswith(" (step 3) in 4 evaluations")
