"""`tuner estimate`: what it says, and that what it advises is so."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

import tuner
from tuner import train
from tuner.__main__ import dispatch, reported
from tuner.errors import ConfigError
from tuner.estimating.devices import MIB, Device, device_named, devices
from tuner.estimating.predicting import Predictor
from tuner.types import MemoryEstimate
from tuner.verbs import estimate as verb
from tuner.verbs.batch_size import SHARE, settle_batch_size
from tuner.verbs.smaller import candidates

SMALL = ("+scale=tiny", "model=llama", "model.num_hidden_layers=3", "data.max_seq_len=192", "train.batch_size=6")


def estimated(*words: str) -> MemoryEstimate:
    return tuner.estimate(tuner.compose([*SMALL, *words]))


def total(*words: str) -> int:
    cfg = tuner.freeze(tuner.compose([*SMALL, *words]))
    _, device = verb.device_for(cfg)
    return Predictor(verb.plan_of(cfg, device), device).peak().total


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> int:
    """A device of which 60 MiB are there for a run: less than the small one takes in fp32."""

    def small(name: str) -> Device:
        device = device_named(name)
        return replace(device, memory_bytes=device.reserved_bytes + 60 * MIB)

    monkeypatch.setattr(verb, "device_named", small)
    return 60 * MIB


def test_a_run_that_fits() -> None:
    cfg = tuner.compose([*SMALL, "estimate.device=h100"])
    found = tuner.estimate(cfg)
    assert found.fits
    assert found.device == "h100"
    assert found.peak_bytes == sum(found.components.values())
    assert list(found.components) == list(verb.COMPONENTS[:-1])
    assert found.when == "backward pass, last layer"
    assert not found.changes
    assert found.largest_batch is not None
    assert found.largest_batch > 6
    assert found.longest_sequence == 2048  # the model's context
    said = "\n".join(verb.said(found, cfg))
    for component in verb.COMPONENTS[:-1]:
        assert component.replace("_", " ") in said
    assert "it fits" in said
    assert f"with data.max_seq_len=192: up to train.batch_size={found.largest_batch}" in said


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_would(little_memory: int) -> None:
    found = estimated("estimate.device=cpu")
    assert not found.fits
    assert found.peak_bytes > found.available_bytes == little_memory
    assert found.largest_batch is not None
    assert found.longest_sequence is not None
    for words, fits in (
        ((f"train.batch_size={found.largest_batch}",), True),
        ((f"train.batch_size={found.largest_batch + 1}",), False),
        ((f"data.max_seq_len={found.longest_sequence}",), True),
        ((f"data.max_seq_len={found.longest_sequence + verb.SEQUENCE_STEP}",), False),
    ):
        assert (total("estimate.device=cpu", *words) <= little_memory) == fits
    assert len(found.changes) == 3
    for change in found.changes:
        assert total("estimate.device=cpu", *change.words) == change.peak_bytes <= little_memory
    rows, batches = (int(word.partition("=")[2]) for word in found.changes[0].words)
    assert rows * batches == 6  # the step learns from as many rows as before


@pytest.mark.slow
def test_pairs_of_changes_where_none_alone_is_enough(little_memory: int) -> None:
    words = ("estimate.device=cpu", "peft=full", "precision=bf16", "model.vocab_size=10240")
    changes = estimated(*words).changes
    assert changes
    for change in changes:
        assert total(*words, *change.words) == change.peak_bytes <= little_memory
        halves = [word for word in change.words if not word.startswith("train.gradient_accumulation_steps")]
        assert len(halves) == 2


def test_changes_are_in_the_order_of_what_they_cost() -> None:
    def words(*said: str, device: str = "h100") -> list[str]:
        cfg = tuner.freeze(tuner.compose([*SMALL, *said]))
        return [" ".join(change) for change in candidates(cfg, 3, 128, device_named(device))]

    assert words("peft=full") == [
        "train.batch_size=3 train.gradient_accumulation_steps=2",
        "memory.activation_checkpointing=full",
        "optimizer=adamw8bit",
        "precision=bf16",
        "memory.offload_optimizer=true",
        "data.max_seq_len=128",
        "peft=lora",
        "peft=qlora",
    ]
    offload = "memory.offload_optimizer=true"
    assert offload not in words("peft=full", device="cpu")
    assert offload not in words("peft=full", offload)
    assert offload not in words("peft=lora")  # whose state is small
    assert offload in words("peft=last_layers")


@pytest.mark.slow
def test_an_offloaded_optimizer_is_advised_where_it_makes_a_run_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("estimate.device=h100", "peft=full", "train.batch_size=1", "memory.activation_checkpointing=full")
    words += ("optimizer=muon", "precision=bf16", "data.max_seq_len=64")
    there = total(*words, "memory.offload_optimizer=true")
    assert there < total(*words)

    def small(name: str) -> Device:
        device = device_named(name)
        return replace(device, memory_bytes=device.reserved_bytes + there)

    monkeypatch.setattr(verb, "device_named", small)
    first = estimated(*words).changes[0]
    assert (first.words, first.peak_bytes) == (("memory.offload_optimizer=true",), there)


@pytest.mark.slow
def test_the_command_shows_no_state_of_an_offloaded_optimizer(tmp_path: Path) -> None:
    words = ["model=llama3_8b", "peft=full", "precision=bf16", "data.max_seq_len=512", "train.batch_size=1"]
    words += ["estimate.device=a100_40", "memory.offload_optimizer=true", "memory.activation_checkpointing=full"]
    command = [sys.executable, "-m", "tuner", "estimate", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line.split() for line in done.stdout.splitlines() if "optimizer state" in line] == [
        ["optimizer", "state", "0.0"]
    ]
    assert "it fits" in done.stdout
    refused = subprocess.run([*command, "device=cpu"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "memory.offload_optimizer=True device=cpu: the optimizer's state is in the CPU's memory" in refused.stderr


@pytest.mark.slow
def test_auto_is_the_largest_divisor_of_a_steps_rows_that_fits(little_memory: int) -> None:
    words = ("estimate.device=cpu", "train.batch_size=auto", "train.gradient_accumulation_steps=12")
    cfg = tuner.freeze(tuner.compose([*SMALL, *words]))
    name, device = verb.device_for(cfg)
    settle_batch_size(cfg, verb.plan_of(cfg, device), name, device)
    rows, batches = cfg.train.batch_size, cfg.train.gradient_accumulation_steps
    assert rows * batches == 12
    assert rows in (2, 3, 4)
    fitting = [
        size
        for size in (1, 2, 3, 4, 6, 12)
        if total(f"train.batch_size={size}", f"train.gradient_accumulation_steps={12 // size}") <= SHARE * little_memory
    ]
    assert rows == max(fitting)


def test_auto_where_no_row_fits_is_a_persons_error(little_memory: int) -> None:
    words = ("estimate.device=cpu", "train.batch_size=auto", "model.vocab_size=65536")
    with pytest.raises(ConfigError, match="not even one row of 192 tokens fits on cpu"):
        estimated(*words)


@pytest.mark.slow
def test_a_run_with_auto_writes_down_what_it_came_to(tmp_path: Path) -> None:
    words = ("model=tiny", "train.batch_size=auto", "train.gradient_accumulation_steps=6", "data.max_seq_len=64")
    more = ("train.max_steps=1", "train.num_samples=0", "logger=none", f"out={tmp_path / 'run'}")
    summary = tuner.run(tuner.compose([*words, *more]))
    assert summary.status == "finished"
    written = OmegaConf.load(tmp_path / "run" / "config.yaml").train
    assert (written.batch_size, written.gradient_accumulation_steps) == (6, 1)
    again = tuner.run(tuner.compose([*words, *more]))  # the same words: the run that is there
    assert again.status == "finished"


@pytest.mark.slow
def test_a_run_goes_on_where_its_memory_cannot_be_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tuner.freeze(tuner.compose([*SMALL, "device=cpu"]))
    lines: list[str] = []
    terminal: Any = SimpleNamespace(say=lines.append)
    assert train.foretold(cfg, terminal) == pytest.approx(total() / MIB)
    assert lines == []

    def refuses(params: Any) -> Any:
        raise ValueError("numbers wanted")

    monkeypatch.setattr(verb, "build_optimizer", lambda node, params, trusted: refuses(params))
    assert train.foretold(cfg, terminal) is None
    assert lines == ["peak memory was not predicted: ValueError: numbers wanted"]


def test_an_unknown_device_is_a_persons_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(lambda: dispatch(["estimate", *SMALL, "estimate.device=h1000"]), debug=False) == 2
    said = capsys.readouterr().err
    assert "estimate.device=h1000: no such device; did you mean h100" in said
    assert all(name in said for name in devices())


def test_every_device_is_named_in_the_guide() -> None:
    guide = (Path(tuner.__file__).parents[1] / "docs" / "memory.md").read_text()
    assert all(f"`{name}`" in guide for name in devices())


def test_a_model_of_unknown_shape_is_a_persons_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        tuner.estimate(tuner.compose([f"model.path={tmp_path / 'nothing'}"]))


@pytest.mark.slow
def test_eight_billion_parameters_without_weights_or_a_gpu(tmp_path: Path) -> None:
    words = ["model=llama3_8b", "peft=qlora", "precision=bf16", "data.max_seq_len=2048", "estimate.device=rtx4090"]
    command = [sys.executable, "-m", "tuner", "estimate", *words, "train.batch_size=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "it fits" in done.stdout
    assert not list(tmp_path.iterdir())
