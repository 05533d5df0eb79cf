"""Cells of `benchmarks/estimate.py`: the predicted peak of a step beside what the allocator's own events say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

import tuner

FILE = Path(tuner.__file__).parents[1] / "benchmarks" / "estimate.py"
PROMISED = 0.05
SEEN, SEEN_IN_16_BITS = 0.005, 0.02
"""On a CPU every allocation is counted but for a few small ones inside kernels, those of products in 16 bits somewhat
larger; see `benchmarks/estimate.md`."""


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_of_estimate", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


CELLS = {cell.title: cell for cell in benchmark().cells()}
SOME = [title for title in CELLS if "smollm2" not in title and "16" not in title][::4]
SOME += ["llama bf16_stochastic full adamw8bit 4 256", "llama amp_bf16 lora 4 256"]
"""Few in 16 bits, for which a CPU may have no instructions: a step takes half a minute there."""
FAST = [title for title in CELLS if title.startswith(("llama lora fp32 adamw", "qwen2 qlora bf16 adamw8bit"))]


def test_every_choice_is_among_the_cells() -> None:
    words = {word for cell in CELLS.values() for word in cell.words}
    assert len(CELLS) >= 40
    for family in ("llama", "gemma2", "qwen2", "phi3"):
        assert f"model={family}" in words
    assert {"data.packing=pack", "train.gradient_accumulation_steps=2", "optimizer=sgd"} <= words
    assert FAST


@pytest.mark.parametrize("title", FAST)
def test_predicted_is_measured(title: str) -> None:
    one = benchmark().outcome(CELLS[title], "cpu")
    assert abs(one.error) < SEEN
    assert abs(one.error_of_step) < 2 * SEEN


@pytest.mark.slow
@pytest.mark.parametrize("title", SOME)
def test_predicted_is_measured_in_more_cells(title: str) -> None:
    one = benchmark().outcome(CELLS[title], "cpu")
    assert abs(one.error) < (SEEN_IN_16_BITS if "16" in title else SEEN)


@pytest.mark.gpu
@pytest.mark.parametrize("title", list(CELLS))
def test_predicted_is_measured_on_a_gpu(title: str) -> None:
    assert abs(benchmark().outcome(CELLS[title], "cuda").error) < PROMISED
