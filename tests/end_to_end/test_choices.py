"""Every word a person can choose trains: optimizers, schedules, methods, precisions, memory, loggers."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tuner.config import conf_dir
from tuner.precision.resolve import resolve

STEPS = 6
COMMON = [f"train.max_steps={STEPS}", "train.num_samples=0", "train.num_threads=1", "logger=none"]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def trained(shell: Any, *words: str) -> tuple[dict[str, Any], Path]:
    """Summary and folder of a run of a few steps; it said nothing on stderr."""
    name = f"run{len(list(shell.folder.iterdir()))}"
    done = shell.inside("model=tiny", *shell.data, *COMMON, f"out={name}", *words)
    assert (done.code, done.err) == (0, "")
    summary: dict[str, Any] = json.loads((shell.folder / name / "summary.json").read_text())
    assert summary["status"] == "finished"
    return summary, shell.folder / name


OPTIMIZERS = [[f"optimizer={name}"] for name in options("optimizer") if name != "custom"]
CHOICES = [
    *OPTIMIZERS,
    ["optimizer=custom", "optimizer._target_=torch.optim.RAdam"],
    ["optimizer._target_=torch.optim.RAdam", "~optimizer.fused"],
    ["optimizer=custom", "optimizer._target_=bitsandbytes.optim.Lion8bit", "optimizer.lr=1e-4"],
    ["peft=full", "optimizer=muon", "optimizer.no_decay=[norms,biases,embeddings]", "precision=bf16"],
    ["peft=full", "optimizer=adafactor"],
    ["optimizer.loraplus_lr_ratio=8", "optimizer.lr=0.002"],
    ["optimizer=custom", "optimizer._target_=torch.optim.RAdam", "optimizer.loraplus_lr_ratio=4"],
    *([f"schedule={name}"] for name in options("schedule")),
    *([f"peft={name}"] for name in options("peft") if name != "adapter"),  # which needs one that is there
    ["peft=full", "precision=bf16"],
    *(["peft=lora", f"quantization={name}", "precision=bf16"] for name in options("quantization") if name != "none"),
    ["precision=bf16", "precision.trainable=bf16"],
    ["precision=bf16", "precision.trainable=fp32"],
    *([f"precision={name}", "peft=full"] for name in options("precision") if name not in ("fp32", "bf16")),
    ["precision=bf16_stochastic", "peft=lora", "optimizer=adamw8bit"],
    ["precision=amp_bf16", "peft=qlora", "data.packing=pack", "memory.activation_checkpointing=full"],
    ["precision=amp_fp16", "peft=lora", "peft.lora_dropout=0.1", "train.gradient_accumulation_steps=2"],
    ["peft.lora_dropout=0.1", "peft.apply_lora_to_output=true", "model.tie_word_embeddings=false"],
    ["memory.activation_checkpointing=full"],
    ["memory.activation_checkpointing=true"],
    ["memory.activation_checkpointing=selective"],
    ["memory=low"],
    ["memory.optimizer_in_bwd=true", "train.clip_grad_norm=null", "peft=full"],
    ["memory.optimizer_in_bwd=true", "train.clip_grad_norm=null", "train.clip_grad_norm_per_parameter=0.5"],
    ["train.clip_grad_norm=null", "train.clip_grad_norm_per_parameter=0.5"],
    ["train.gradient_accumulation_steps=3", "train.batch_size=3"],
    ["train.clip_grad_norm=null", "train.val_every_steps=null", "train.log_every_steps=4"],
    ["data.packing=pack"],
    ["data.packing=pack", "data.pack_len=1024", "precision=bf16", "memory.activation_checkpointing=full"],
    ["data.packing=group"],
]


@pytest.mark.slow
@pytest.mark.parametrize("words", CHOICES, ids=[" ".join(words) for words in CHOICES])
def test_a_choice_trains(shell: Any, words: list[str]) -> None:
    # Random weights learn slowly; a rate at which the loss of six steps falls further than it varies.
    rate = [] if any("optimizer.lr" in word for word in words) else ["optimizer.lr=0.01"]
    summary, _ = trained(shell, *words, *rate)
    assert summary["steps"] == STEPS
    assert summary["val_loss"] < summary["val_loss_before"]


def test_the_choices_are_all_there_are() -> None:
    assert len(OPTIMIZERS) >= 12
    assert len(options("schedule")) >= 3
    assert set(options("peft")) >= {"full", "lora", "qlora", "rslora", "dora", "pissa", "olora", "ia3", "layernorm"}
    assert set(options("quantization")) >= {"none", "nf4", "fp4", "int8"}
    assert set(options("precision")) >= {"fp32", "bf16", "amp_bf16", "amp_fp16", "bf16_stochastic"}


@pytest.mark.slow
def test_what_trains_is_kept_in_the_dtype_that_was_asked_for(shell: Any) -> None:
    assert trained(shell, "precision=bf16")[0]["trainable_dtype"] == "float32"
    assert trained(shell, "precision=bf16", "precision.trainable=bf16")[0]["trainable_dtype"] == "bfloat16"
    assert trained(shell, "precision=bf16", "peft=full")[0]["trainable_dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["auto", "bf16"])
def test_a_device_without_bf16_is_trained_in_fp32_and_the_records_say_so(
    trainable: str, shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old GPU as `resolve` meets it; training itself is on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr("tuner.train.resolve", lambda precision, device: resolve(precision, torch.device("cuda", 0)))
    words = ["peft=qlora", "precision=bf16", f"precision.trainable={trainable}", f"out=old_{trainable}"]
    done = shell.inside("model=tiny", *shell.data, *COMMON, *words)
    assert (done.code, done.err) == (0, "")
    out = shell.folder / f"old_{trainable}"
    assert done.out.count("precision: Tesla T4 has no bfloat16, so this run uses fp32") == 1
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["precision"], summary["trainable_dtype"]) == ("fp32", "float32")
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    facts = json.loads((out / "adapter" / "tuner.json").read_text())  # what `generate` and `merge` load the base in
    assert facts["precision"] == "fp32"


@pytest.mark.slow
def test_epochs_are_what_decides_without_max_steps(shell: Any) -> None:
    words = ["train.max_steps=null", "train.epochs=2", "train.batch_size=32", "train.val_every_steps=null"]
    summary, out = trained(shell, *words)
    examples = json.loads((out / "environment.json").read_text())["dataset"]["counts"]["train"]
    assert summary["steps"] == 2 * -(-examples // 32)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    validated = [row["step"] for row in rows if "val/loss" in row]
    assert validated == [0, summary["steps"] // 2, summary["steps"]]


def test_activation_checkpointing_changes_no_bit(shell: Any) -> None:
    (_, plain), (_, saving) = trained(shell), trained(shell, "memory.activation_checkpointing=full")
    mine, theirs = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (plain, saving))
    assert all(mine[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow
def test_accumulation_equals_the_large_batch(shell: Any) -> None:
    large, _ = trained(shell, "train.batch_size=8", "optimizer=sgd")
    small, _ = trained(shell, "train.batch_size=2", "train.gradient_accumulation_steps=4", "optimizer=sgd")
    # fp32 sums in another order
    assert small["train_loss"] == pytest.approx(large["train_loss"], rel=1e-5)
    assert small["val_loss"] == pytest.approx(large["val_loss"], rel=1e-5)
    assert small["tokens"] == large["tokens"]


@pytest.mark.slow
def test_full_training_leaves_a_model_that_transformers_loads(shell: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import tuner

    summary, out = trained(shell, "peft=full")
    assert not (out / "adapter").exists()
    assert summary["trainable_params"] == summary["total_params"]
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)(tokens).logits
        ours = tuner.load_model(out / "model", dtype=torch.float32)(tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(out / "model")) <= 352
    done = shell.inside("evaluate", f"run={out}")
    assert f"val_loss: {summary['val_loss']:.6f}"[:16] in done.out
    further, _ = trained(shell, f"model.path={out}/model", "model=llama")
    assert further["val_loss_before"] == pytest.approx(summary["val_loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["peft=full", "precision=amp_bf16"],
        ["peft=qlora", "precision=amp_fp16"],
        ["peft=lora", "precision=bf16_stochastic"],
    ],
    ids=" ".join,
)
def test_a_run_of_any_precision_is_evaluated_as_it_was_trained(shell: Any, words: list[str]) -> None:
    summary, out = trained(shell, *words)
    done = shell.inside("evaluate", f"run={out}")
    assert f"val_loss: {summary['val_loss']:.6f}"[:16] in done.out
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert f"val_loss: {summary['val_loss']:.6f}"[:16] in shell.inside("evaluate", f"checkpoint={checkpoint}").out
    stored = load_file(next(out.glob("*/*.safetensors")))
    rounded = summary["trainable_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16 if rounded else torch.float32}


@pytest.mark.slow
def test_tensorboard(shell: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary, out = trained(shell, "logger=tensorboard")
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    losses = events.Scalars("val/loss")
    assert losses[-1].step == STEPS
    assert losses[-1].value == pytest.approx(summary["val_loss"], rel=1e-6)  # stored in single precision


@pytest.mark.slow
def test_many_loggers(shell: Any) -> None:
    summary, out = trained(shell, "logger=many")
    assert (out / "tensorboard").is_dir()
    assert yaml.safe_load((out / "config.yaml").read_text())["logger"]["loggers"].keys() == {"mlflow", "tensorboard"}
    assert summary["mlflow_run_id"]


@pytest.mark.slow
def test_wandb_offline(shell: Any) -> None:
    _, out = trained(shell, "logger=wandb", "logger.mode=offline")
    assert list(out.rglob("*.wandb"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="has no C++ compiler")
@pytest.mark.parametrize(
    "words", [[], ["peft=full"], ["peft=qlora"], ["data.packing=pack"]], ids=["lora", "full", "qlora", "packed"]
)
def test_compiled_training_learns_the_same(shell: Any, words: list[str]) -> None:
    plain, _ = trained(shell, *words)
    compiled, _ = trained(shell, *words, "train.compile=true")
    # fp32; compiled kernels add in another order
    assert compiled["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-4)
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)
