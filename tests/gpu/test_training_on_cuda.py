"""The same runs on a GPU: they train, agree with the CPU, and say what memory they took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tuner

pytestmark = pytest.mark.gpu

TINY = ("model=tiny", "logger=none", "train.max_steps=6", "train.num_samples=1", "train.max_new_tokens=8")


def losses(out: Path, *words: str) -> tuple[list[float], Any]:
    from tuner.logging.disk import read_metrics

    summary = tuner.run(tuner.compose([*TINY, *words, f"out={out}"]))
    return [row.metrics["train/loss"] for row in read_metrics(out) if "train/loss" in row.metrics], summary


@pytest.mark.parametrize("peft", ["full", "lora", "qlora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_the_gpu_follows_the_run_on_the_cpu(peft: str, precision: str, tmp_path: Path) -> None:
    words = (f"peft={peft}", f"precision={precision}")
    on_gpu, summary = losses(tmp_path / "gpu", *words, "device=cuda")
    on_cpu, _ = losses(tmp_path / "cpu", *words, "device=cpu")
    # Another order of sums in fp32 (TF32 is off by default); 8 bits of mantissa in bf16.
    tolerance = 1e-3 if precision == "fp32" else 3e-2
    assert on_gpu == pytest.approx(on_cpu, rel=tolerance)
    assert summary.device.startswith("cuda")
    assert summary.peak_memory_mib == pytest.approx(torch.cuda.max_memory_allocated() / 2**20)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adam8bit", "paged_adamw", "paged_adamw8bit", "sgd"])
def test_every_optimizer_trains_on_the_gpu(optimizer: str, tmp_path: Path) -> None:
    before_and_after, summary = losses(tmp_path / "run", f"optimizer={optimizer}", "optimizer.lr=0.01", "device=cuda")
    assert before_and_after[-1] < before_and_after[0]
    assert summary.status == "finished"


def test_nf4_bytes_on_the_gpu_equal_bitsandbytes(tmp_path: Path) -> None:
    from tuner.quantization.nf4 import NF4Linear
    from tuner.quiet import import_bitsandbytes

    functional = import_bitsandbytes().functional
    dense = torch.nn.Linear(192, 500, bias=False, dtype=torch.bfloat16, device="cuda")
    ours = NF4Linear.from_linear(dense, block_size=64, double_quant=True)
    packed, state = functional.quantize_4bit(dense.weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    torch.testing.assert_close(ours.weight, packed.flatten(), rtol=0, atol=0)
    torch.testing.assert_close(ours.dense_weight(), functional.dequantize_4bit(packed, state), rtol=0, atol=0)


def test_a_run_on_the_gpu_continues_after_a_stop(tmp_path: Path) -> None:
    whole, _ = losses(tmp_path / "whole", "device=cuda")
    losses(tmp_path / "parts", "device=cuda", "train.max_steps=3", "schedule=constant")
    more, _ = losses(tmp_path / "parts", "device=cuda", "schedule=constant")
    assert len(more) == len(whole) == 6
