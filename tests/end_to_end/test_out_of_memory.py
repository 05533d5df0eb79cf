"""The command where memory runs out: a line that says so, or a run that goes on in smaller batches."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tuner.fit
import tuner.loop
import tuner.train
import tuner.verbs.source
from tuner.out_of_memory import ADVICE

ROWS = 256
LIMITED = """
import resource, sys, tuner.train
fit = tuner.train.fit
def limited(*parts):
    used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize:"))
    resource.setrlimit(resource.RLIMIT_AS, ((used << 10) + (512 << 20),) * 2)
    fit(*parts)
tuner.train.fit = limited
from tuner.__main__ import main
main()
"""
"""The command, with room for 512 MiB more than it has when all is made; of rows of 512 tokens 64 take 316 MiB."""


@pytest.fixture(scope="module")
def words(shell: Any) -> list[str]:
    few = ["train.max_steps=3", "train.num_samples=0", "train.num_threads=1", "train.batch_size=8"]
    return ["model=tiny", *shell.data, *few, "logger=none", "checkpoint.every_steps=1"]


def summary(shell: Any, run: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((shell.folder / run / "summary.json").read_text())
    return loaded


def fills(at: int, rows: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, with no room for more rows than that from its `at`th time on."""
    calls = 0

    def limited(model: Any, batches: Any, *more: Any, **words: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= at and any(batch.num_rows > rows for batch in batches):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return call(model, batches, *more, **words)

    return limited


def test_it_ends_with_a_line_and_goes_on_with_retry(
    shell: Any, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = tuner.loop.add_gradients
    with monkeypatch.context() as patch:
        patch.setattr(tuner.loop, "add_gradients", fills(2, 2, gradients))
        done = shell.inside(*words, "out=stop")
    assert done.code == 2
    assert done.err.startswith("error: out of memory: step 2 with batches of 8 rows of ")
    assert done.err.endswith(
        " tokens: CUDA out of memory. Tried to allocate 2.00 GiB; train.on_oom=retry goes on with half as many rows at "
        f"once in twice as many batches; {ADVICE}\n"
    )
    assert done.err.count("\n") == 1
    told = summary(shell, "stop")
    assert (told["status"], told["steps"], told["batch_size_used"], told["accumulation_used"]) == ("failed", 1, 8, 1)
    assert told["reason"] == done.err.removeprefix("error: ").rstrip()
    assert told["peak_memory_mib"] > 0
    assert "Traceback (most recent call last):" in (shell.folder / "stop" / "run.log").read_text()

    # What was done is not another run's because memory that runs out is now seen to; the rest has two rows at once.
    with monkeypatch.context() as patch:
        patch.setattr(tuner.loop, "add_gradients", fills(1, 2, gradients))
        done = shell.inside(*words, "out=stop", "train.on_oom=retry", "train.max_steps=3")
    assert (done.code, done.err) == (0, "")
    assert "resumed at step 1 of 3" in done.out
    assert "warning: out of memory: step 2 with batches of 8 rows" in done.out
    assert "warning: out of memory: step 2 with batches of 4 rows" in done.out
    told = summary(shell, "stop")
    assert (told["status"], told["reason"], told["steps"]) == ("finished", None, 3)
    assert (told["batch_size_used"], told["accumulation_used"]) == (2, 4)
    trained = [row for row in shell.rows("stop") if "train/loss" in row]
    assert [row.get("memory/rows_at_once") for row in trained] == [None, 2, 2]


@pytest.mark.parametrize("where", ["load_base", "evaluate", "write_samples"])
def test_it_is_named_wherever_it_happens(
    where: str, shell: Any, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*words: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    patched = {"load_base": tuner.train, "evaluate": tuner.fit, "write_samples": tuner.fit}
    with monkeypatch.context() as patch:
        patch.setattr(patched[where], where, full)
        done = shell.inside(*words, f"out={where}", "train.on_oom=retry")
    said = f"out of memory: CUDA out of memory. Tried to allocate 2.00 GiB; {ADVICE}"
    assert (done.code, done.err) == (2, f"error: {said}\n")
    told = summary(shell, where)
    assert (told["status"], told["reason"]) == ("failed", said)
    assert told["peak_memory_mib"] > 0
    assert told["log_tail"][-1].endswith("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.slow
def test_an_evaluation_goes_on_in_halves(shell: Any, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    summed = tuner.loop.summed_loss

    def limited(model: Any, batch: Any) -> float:
        if batch.num_rows > 3:
            raise torch.OutOfMemoryError("full")
        return summed(model, batch)

    expected = shell.inside(*words, "out=room")
    with monkeypatch.context() as patch:
        patch.setattr(tuner.loop, "summed_loss", limited)
        done = shell.inside(*words, "out=halves", "train.on_oom=retry")
    assert (expected.code, done.code) == (0, 0)
    assert done.out.count("warning: out of memory: evaluation with batches of ") == 2  # of 8 rows and of 4, once each
    for name in ("val_loss_before", "val_loss"):
        assert summary(shell, "halves")[name] == pytest.approx(summary(shell, "room")[name], rel=1e-6)
    assert summary(shell, "halves")["batch_size_used"] == 8


@pytest.mark.slow
def test_other_verbs_say_it_too(shell: Any, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell.inside(*words, "peft=lora", "out=trained").code == 0
    whole = shell.inside("evaluate", "run=trained", *shell.data)
    summed = tuner.loop.summed_loss

    def limited(model: Any, batch: Any) -> float:
        if batch.num_rows > 3:
            raise torch.OutOfMemoryError("full")
        return summed(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(tuner.loop, "summed_loss", limited)
        with pytest.warns(UserWarning, match="out of memory: evaluation with batches of ") as warned:
            halved = shell.inside("evaluate", "run=trained", *shell.data)
    assert halved.code == whole.code == 0
    assert len(warned) == 2
    loss, expected = (float(done.out.partition("val_loss: ")[2].split()[0]) for done in (halved, whole))
    assert loss == pytest.approx(expected, rel=1e-6)

    def full(*words: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(tuner.verbs.source, "load_base", full)
    for verb in (["generate", "prompt=x"], ["merge", "dest=merged"], ["evaluate", *shell.data]):
        done = shell.inside(verb[0], "run=trained", *verb[1:])
        assert (done.code, done.err) == (2, "error: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB\n")


@pytest.mark.slow
def test_real_memory_that_runs_out(shell: Any, tmp_path: Path) -> None:
    """Whatever the allocator has kept aside, a batch of 256 rows does not fit and one of 16 does."""
    file = tmp_path / "long.jsonl"
    reply = " ".join(str(number) for number in range(150))
    rows = [{"instruction": f"Count from {i}.", "input": "", "output": reply} for i in range(ROWS + 16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["model=tiny", "data=alpaca", f"data.path={file}", "data.val_fraction=0.05", "data.max_seq_len=512"]
    words += [f"train.batch_size={ROWS}", "train.max_steps=2", "train.num_samples=0", "train.num_threads=1"]
    words += ["logger=none", "device=cpu", "data.workers=1", f"out={tmp_path / 'run'}"]

    def command(*more: str) -> Any:
        line = [sys.executable, "-c", LIMITED, *words, *more]
        return subprocess.run(
            line, cwd=shell.folder, env=shell.env, capture_output=True, text=True, check=False, timeout=600
        )

    ended = command()
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(f"error: out of memory: step 1 with batches of {ROWS} rows of ")
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate " in ended.stderr
    assert ended.stderr.count("\n") == 1
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (told["status"], told["reason"]) == ("failed", ended.stderr.removeprefix("error: ").rstrip())

    done = command("train.on_oom=retry")
    assert done.returncode == 0, done.stderr
    assert f"warning: out of memory: step 1 with batches of {ROWS} rows: DefaultCPUAllocator" in done.stdout
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (told["status"], told["steps"]) == ("finished", 2)
    assert 16 <= told["batch_size_used"] < ROWS
    assert told["accumulation_used"] * told["batch_size_used"] == ROWS
