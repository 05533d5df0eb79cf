"""A run whose numbers stop making sense ends with a line that says where, or leaves such steps out and says so."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from tuner.logging.disk import read_metrics


@pytest.fixture(scope="module")
def words(shell: Any) -> list[str]:
    """Weights of 1e30 after the first step: whatever follows is not a number."""
    rates = ["optimizer=sgd", "optimizer.lr=1e30", "schedule=constant", "train.clip_grad_norm=null"]
    few = ["train.max_steps=4", "train.batch_size=2", "train.gradient_accumulation_steps=3", "train.num_samples=0"]
    return ["model=tiny", "peft=full", *shell.data, *rates, *few, "train.num_threads=1", "logger=none"]


def test_the_run_ends_before_the_step_and_names_the_samples(shell: Any, words: list[str]) -> None:
    done = shell.inside(*words, "out=stop", "checkpoint.every_steps=1")
    assert done.code == 2
    said = (
        r"error: step 2: loss \w+, gradient norm \w+: not finite, not stepped; samples (\d+, ){5}\d+;"
        r" train\.on_nonfinite=skip leaves such steps out\n"
    )
    assert re.fullmatch(said, done.err)
    summary = json.loads((shell.folder / "stop" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["skipped_steps"]) == ("failed", 1, 0)
    assert summary["reason"] == f"TrainingError: {done.err.removeprefix('error: ').strip()}"
    # What was saved before it is not another run's because such steps are now left out.
    again = shell.inside(*words, "out=stop", "checkpoint.every_steps=1", "train.on_nonfinite=skip")
    assert (again.code, "resumed at step 1 of 4" in again.out) == (0, True)


def test_steps_are_left_out_counted_and_said(shell: Any, words: list[str]) -> None:
    done = shell.inside(*words, "out=skip", "train.on_nonfinite=skip", "train.log_every_steps=10")
    assert done.code == 0
    summary = json.loads((shell.folder / "skip" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["skipped_steps"]) == ("finished", 4, 3)
    assert math.isfinite(summary["train_loss"])  # of the step that was taken
    lines = [json.loads(line) for line in (shell.folder / "skip" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == [2, 3, 4]  # each, though only every tenth step is logged
    assert {line["train/loss"] for line in trained} <= {"NaN", "Infinity"}
    assert [row.step for row in read_metrics(shell.folder / "skip") if "train/loss" in row.metrics] == [2, 3, 4]
    for number in (2, 3, 4):
        assert re.search(rf"^skipped: step {number}: loss \w+, .* not stepped; samples \d+, ", done.out, re.MULTILINE)
