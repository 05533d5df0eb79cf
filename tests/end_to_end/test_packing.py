"""Packed rows and groups of one length, through the command: an epoch is the same texts in fewer positions."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

EPOCH = ["model=tiny", "train.max_steps=null", "train.epochs=1", "train.num_samples=0", "train.num_threads=1"]
EPOCH += ["train.val_every_steps=null", "data.max_samples=64", "logger=none"]


def epoch(shell: Any, packing: str, *words: str) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Summary, logged steps and what the terminal said of one epoch."""
    out = f"run{len(list(shell.folder.iterdir()))}"
    done = shell.inside(*EPOCH, *shell.data, f"data.packing={packing}", f"out={out}", *words)
    assert (done.code, done.err) == (0, "")
    summary = json.loads((shell.folder / out / "summary.json").read_text())
    return summary, [row for row in shell.rows(out) if "train/loss" in row], done.out


@pytest.mark.slow
def test_an_epoch_trains_on_the_same_texts_in_fewer_positions(shell: Any) -> None:
    """Batches of about as many tokens: one row of 1024 for 8 samples."""
    found = {
        packing: epoch(shell, packing, "optimizer.lr=0.01", *words)
        for packing, words in {
            "none": [],
            "group": [],
            "pack": ["data.pack_len=1024", "train.batch_size=1"],
        }.items()
    }
    padding = {}
    for packing, (summary, steps, _) in found.items():
        assert summary["val_loss"] < summary["val_loss_before"]
        assert summary["tokens"] == found["none"][0]["tokens"] == steps[-1]["tokens"]
        assert summary["steps"] == len(steps)
        padding[packing] = sum(step["perf/padding_share"] for step in steps) / len(steps)
    assert found["group"][0]["steps"] == found["none"][0]["steps"]
    assert 0 <= padding["group"] < padding["none"]
    assert found["pack"][0]["val_loss_before"] == pytest.approx(found["none"][0]["val_loss_before"], rel=1e-6)
    # The same texts in about as many steps: about as much is learnt
    steps, learnt = (
        {packing: number(one) for packing, (one, _, _) in found.items()}
        for number in (lambda one: one["steps"], lambda one: one["val_loss_before"] - one["val_loss"])
    )
    assert steps["pack"] == pytest.approx(steps["none"], abs=2)
    assert learnt["pack"] / steps["pack"] == pytest.approx(learnt["none"] / steps["none"], rel=0.4)


def test_the_header_says_how_full_rows_are(shell: Any) -> None:
    summary, steps, said = epoch(shell, "pack")
    (line,) = [line for line in said.splitlines() if " rows of 512 tokens, " in line]
    rows, full = int(line.split()[2]), float(line.split(" tokens, ")[1].split(" %")[0]) / 100
    assert full == pytest.approx(summary["tokens"] / (rows * 512), abs=1e-3)
    assert summary["steps"] == -(-rows // 8)
    assert f"{summary['steps']} steps of 8 rows (8 x 1)" in said
    positions = sum(step / (1 - row["perf/padding_share"]) for step, row in zip(tokens_of(steps), steps, strict=True))
    assert positions <= rows * 512


def tokens_of(steps: list[dict[str, Any]]) -> list[float]:
    """Tokens of each step."""
    totals = [0.0, *(step["tokens"] for step in steps)]
    return [after - before for before, after in pairwise(totals)]
