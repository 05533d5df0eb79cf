"""What a run leaves at its end and at the end of each epoch before, and that a run that was killed leaves the same."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tuner
from tuner.errors import CheckpointError

STEPS_OF_EPOCH = 3
QUICK = ["train.num_samples=0", "train.num_threads=1", "train.log_every_steps=1", "logger=none"]
SAME = ("step", "tokens", "train/loss", "train/lr", "train/grad_norm", "val/loss")


@pytest.fixture(scope="module")
def words(shell: Any) -> list[str]:
    length = [
        "train.max_steps=null",
        "train.epochs=3",
        "train.val_every_steps=null",
        "train.batch_size=16",
        "data.max_samples=48",
    ]
    return ["model=tiny", *shell.data, *QUICK, *length, "optimizer.lr=0.01", "peft.lora_dropout=0.1"]


@pytest.fixture(scope="module")
def both(shell: Any, words: list[str]) -> Path:
    """An undisturbed QLoRA run in bf16 that keeps adapters, merged models and every checkpoint at an epoch's end."""
    checkpoints = [f"checkpoint.every_steps={STEPS_OF_EPOCH}", "checkpoint.keep_last=3", "checkpoint.save_merged=true"]
    done = shell.inside(*words, "peft=qlora", "precision=bf16", *checkpoints, "out=both")
    assert (done.code, done.err) == (0, "")
    shown = " ".join(done.out.split())
    assert all(str(shell.folder / "both" / name) in shown for name in ("adapter", "model", "epochs", "checkpoints"))
    assert "tuner merge" not in shown  # it is merged
    return Path(shell.folder / "both")


def left(out: Path) -> dict[str, bytes]:
    """Every weight file of the results by its path."""
    files = (file for name in ("adapter", "model", "epochs") for file in (out / name).rglob("*.safetensors"))
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def learned(shell: Any, run: str) -> list[dict[str, Any]]:
    return [{key: row[key] for key in SAME if key in row} for row in shell.rows(run)]


def test_what_lies_where(both: Path) -> None:
    assert sorted(left(both)) == [
        "adapter/adapter_model.safetensors",
        *(
            f"epochs/{number}/{name}.safetensors"
            for number in (1, 2)
            for name in ("adapter/adapter_model", "model/model")
        ),
        "model/model.safetensors",
    ]
    assert not list(both.rglob("*.unfinished"))
    for epoch in ("epochs/1", "epochs/2"):
        for name in ("adapter", "model"):
            beside = {path.name for path in (both / epoch / name).iterdir()}
            assert beside == {path.name for path in (both / name).iterdir()}


def test_an_epoch_s_adapter_is_that_of_its_last_step(shell: Any, both: Path) -> None:
    for epoch in (1, 2):
        checkpoint = both / "checkpoints" / f"step-{epoch * STEPS_OF_EPOCH:08d}"
        trained = load_file(checkpoint / "trainable.safetensors")
        saved = load_file(both / "epochs" / str(epoch) / "adapter" / "adapter_model.safetensors")
        assert len(saved) == len(trained) > 0
        for name, tensor in saved.items():
            path, _, part = name.removeprefix("base_model.model.").partition(".lora_")
            assert torch.equal(tensor, trained[f"{path}.adapters.default.{part[0]}"]), name
    first, second, last = (
        load_file(both / e / "adapter/adapter_model.safetensors") for e in ("epochs/1", "epochs/2", ".")
    )
    assert not any(torch.equal(first[name], second[name]) or torch.equal(second[name], last[name]) for name in first)


def test_an_epoch_s_model_is_its_adapter_merged(shell: Any, both: Path) -> None:
    done = shell.inside("merge", "model=tiny", f"adapter={both}/epochs/1/adapter", "dest=merged")
    assert (done.code, done.err) == (0, "")
    for name in ("model.safetensors", "config.json"):
        assert (shell.folder / "merged" / name).read_bytes() == (both / "epochs/1/model" / name).read_bytes(), name


@pytest.mark.slow
def test_transformers_gives_the_merged_model_s_logits(both: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(both / "model", dtype=torch.float32)(tokens).logits
        ours = tuner.load_model(both / "model", dtype=torch.float32)(tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(both / "model")) <= 352


@pytest.mark.slow
def test_merging_changes_no_bit_of_the_training(shell: Any, words: list[str], both: Path) -> None:
    """With dropout, so that a random number drawn on the way would be seen."""
    assert shell.inside(*words, "peft=qlora", "precision=bf16", "out=plain").code == 0
    assert learned(shell, "plain") == learned(shell, "both")
    plain, merging = left(shell.folder / "plain"), left(both)
    assert sorted(plain) == [name for name in sorted(merging) if "adapter" in name]
    assert all(plain[name] == merging[name] for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_full_training_leaves_its_model_at_the_end_in_any_case(shell: Any, words: list[str], merged: bool) -> None:
    length = [word for word in words if "epochs=" not in word and "lora" not in word]
    out = f"full {merged}"
    keys = [f"checkpoint.save_merged={str(merged).lower()}", "checkpoint.save_adapter=false", "train.epochs=2"]
    assert shell.inside(*length, "peft=full", *keys, f"out={out}").code == 0
    at_epoch = ["epochs/1/model/model.safetensors"] if merged else []
    assert sorted(left(shell.folder / out)) == [*at_epoch, "model/model.safetensors"]


@pytest.mark.slow
def test_a_merged_model_alone_is_what_run_means(shell: Any, words: list[str], both: Path) -> None:
    keys = ["checkpoint.save_adapter=false", "checkpoint.save_merged=true"]
    assert shell.inside(*words, "peft=qlora", "precision=bf16", *keys, "out=alone").code == 0
    alone = shell.folder / "alone"
    assert {name: bytes_ for name, bytes_ in left(both).items() if "adapter" not in name} == left(alone)
    found = shell.inside("evaluate", "run=alone")
    assert (found.code, found.err) == (0, "")
    expected = shell.inside("evaluate", "model=llama", f"model.path={both}/model", *shell.data, "precision=bf16")
    (loss, wanted) = (re.findall(r"^val_loss: (.*)$", done.out, re.MULTILINE) for done in (found, expected))
    assert loss == wanted != []  # not quantized again


def test_a_run_that_would_leave_nothing_is_refused(shell: Any, words: list[str]) -> None:
    done = shell.inside(*words, "checkpoint.save_adapter=false", "out=nothing")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: checkpoint.save_adapter=false checkpoint.save_merged=false peft=lora: the run")
    assert not (shell.folder / "nothing").exists()


@pytest.mark.slow
def test_the_room_of_every_epoch_is_counted(shell: Any, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(self: Any, state: Any, results_bytes: int, **more: bool) -> None:
        asked.append(results_bytes)
        raise CheckpointError("no room")

    monkeypatch.setattr("tuner.checkpoint.store.CheckpointStore.require_room", refuse)
    length = [word for word in words if "epochs=" not in word]
    for epochs in (1, 4):
        assert shell.inside(*length, f"train.epochs={epochs}", "out=room").code == 2
    assert asked[1] == 4 * asked[0] > 0


@pytest.mark.slow
def test_a_run_asked_for_more_has_the_epochs_of_one_that_was_asked_at_once(shell: Any, words: list[str]) -> None:
    length = [word for word in words if "epochs=" not in word]
    assert shell.inside(*length, "train.epochs=1", "out=more").code == 0
    out = shell.folder / "more"
    first = left(out)
    assert list(first) == ["adapter/adapter_model.safetensors"]
    assert shell.inside(*length, "train.epochs=3", "out=more").code == 0
    assert sorted(left(out)) == [
        "adapter/adapter_model.safetensors",
        "epochs/1/adapter/adapter_model.safetensors",
        "epochs/2/adapter/adapter_model.safetensors",
    ]
    assert left(out)["epochs/1/adapter/adapter_model.safetensors"] == first["adapter/adapter_model.safetensors"]
    only = ["checkpoint.save_adapter=false", "checkpoint.save_merged=true"]
    assert shell.inside(*length, "train.epochs=4", *only, "out=more").code == 0
    assert not (out / "adapter").exists()  # of other weights than the model beside it


@pytest.mark.slow
def test_a_stream_has_epochs_too(shell: Any, words: list[str]) -> None:
    length = [word for word in words if not word.startswith(("train.epochs", "train.max_steps", "data.max_samples"))]
    done = shell.inside(*length, "data.streaming=true", "train.max_steps=16", "out=streamed")
    assert done.code == 0, done.err
    assert [name for name in sorted(left(shell.folder / "streamed")) if "epochs" in name] == [
        "epochs/1/adapter/adapter_model.safetensors",
        "epochs/2/adapter/adapter_model.safetensors",
    ]


KILLED_WHILE_WRITING = """
import os, sys

import tuner.results
from tuner.__main__ import dispatch

epoch, *words = sys.argv[1:]
write = tuner.results.save_weights


def killed(folder, *rest):
    if folder.parent.name == epoch:
        (folder / "half").write_bytes(b"half")
        os.kill(os.getpid(), 9)
    write(folder, *rest)


tuner.results.save_weights = killed
dispatch(words)
"""
"""The command, in a process that dies in the middle of writing an epoch's model."""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["while an epoch is written", "behind it"])
def test_a_killed_run_leaves_what_an_undisturbed_one_leaves(
    shell: Any, words: list[str], both: Path, where: str
) -> None:
    name = f"killed {where}"
    again = [*words, "peft=qlora", "precision=bf16", "checkpoint.save_merged=true", "checkpoint.every_steps=5"]
    again.append("checkpoint.every_epoch=false")  # or it would be behind the epoch's end
    again.append(f"out='{name}'")
    if where == "while an epoch is written":
        done = subprocess.run(
            [sys.executable, "-c", KILLED_WHILE_WRITING, "2", *again], cwd=shell.folder, env=shell.env, check=False
        )
        assert done.returncode == -signal.SIGKILL
        assert (shell.folder / name / "epochs" / "2" / ".model.unfinished" / "half").is_file()
        assert (shell.folder / name / "epochs" / "2" / "adapter").is_dir()
    else:
        done = shell.at_step(shell.start(*again), name, 7, [signal.SIGKILL])
        assert done.code == -signal.SIGKILL
    resumed = shell(*again)
    assert (resumed.code, "resumed at step " in resumed.out) == (0, True)
    assert left(shell.folder / name) == left(both)
    assert not list((shell.folder / name).rglob("*.unfinished"))
    assert learned(shell, name) == learned(shell, "both")
    assert json.loads((shell.folder / name / "summary.json").read_text())["status"] == "finished"
