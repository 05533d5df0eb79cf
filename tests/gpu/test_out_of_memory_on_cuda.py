"""A GPU whose memory runs out, because this process may have a part of it: named, or gone on in smaller batches."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tuner
from tuner.errors import OutOfMemory

pytestmark = pytest.mark.gpu

ROWS = 64


@contextmanager
def room_for(mib: float) -> Iterator[None]:
    """Let PyTorch's allocator have so much of the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(mib * 2**20 / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def losses(out: Path) -> list[float]:
    from tuner.logging.disk import read_metrics

    return [row.metrics["train/loss"] for row in read_metrics(out) if "train/loss" in row.metrics]


@pytest.mark.parametrize("packing", ["none", "pack"])
def test_a_run_goes_on_in_smaller_batches_or_ends_and_leaves_nothing_behind(packing: str, tmp_path: Path) -> None:
    reply = " ".join(str(number) for number in range(150))
    rows = [{"instruction": f"Count from {i}.", "input": "", "output": reply} for i in range(ROWS + 8)]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, *words: str) -> Any:
        said = ["model=tiny", "data=alpaca", f"data.path={file}", "data.val_fraction=0.1", "data.max_seq_len=512"]
        said += [f"train.batch_size={ROWS}", "train.max_steps=3", "train.num_samples=0", "logger=none", "device=cuda"]
        return tuner.run(tuner.compose([*said, f"data.packing={packing}", f"out={tmp_path / name}", *words]))

    room = run("room")
    assert room.batch_size_used == ROWS
    with room_for(0.6 * room.peak_memory_mib), pytest.warns(UserWarning, match="^out of memory: step 1 with batches"):
        retried = run("retry", "train.on_oom=retry")
    assert retried.status == "finished"
    assert retried.batch_size_used in [ROWS >> halvings for halvings in range(1, 7)]
    assert retried.accumulation_used * retried.batch_size_used == ROWS
    assert retried.peak_memory_mib <= 0.6 * room.peak_memory_mib
    assert losses(tmp_path / "retry") == pytest.approx(losses(tmp_path / "room"), rel=1e-4)

    gc.collect()
    before = torch.cuda.memory_allocated()
    with room_for(0.6 * room.peak_memory_mib), pytest.raises(OutOfMemory) as caught:
        run("stop")
    assert str(caught.value).startswith(f"out of memory: step 1 with batches of {ROWS} rows of ")
    assert "CUDA out of memory. Tried to allocate " in str(caught.value)
    told = json.loads((tmp_path / "stop" / "summary.json").read_text())
    assert (told["status"], told["reason"]) == ("failed", str(caught.value))
    assert 0 < told["peak_memory_mib"] <= 0.6 * room.peak_memory_mib
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**20  # the error is still there, and holds nothing
