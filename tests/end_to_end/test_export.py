"""`tuner export`: of any checkpoint of a run what the run leaves at its end, byte for byte."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tuner
from tuner.measure import Speed
from tuner.tokenizers.tiny import write_tiny_tokenizer

STEPS = ["train.max_steps=4", "train.num_samples=0", "train.num_threads=1", "logger=none", "data.max_samples=40"]
KEEP = ["checkpoint.every_steps=2", "checkpoint.keep_last=2", "checkpoint.save_merged=true", "optimizer.lr=0.02"]
METHODS = {
    "lora": ["peft.lora_dropout=0.1"],
    "qlora in bf16": ["peft=qlora", "precision=bf16"],
    "an adapter in bf16": ["precision=bf16", "precision.trainable=bf16", "peft=rslora"],
    "full in bf16": ["peft=full", "precision=bf16"],
    "new tokens": ["model.add_tokens=['<|a|>','<|b|>']"],
    "another chat template": ["model.chat_template=plain"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=352, max_position_embeddings=1024, initializer_range=0.2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


def trained(shell: Any, base: Path, method: str) -> Path:
    """The folder of a run that has finished, with a checkpoint in its middle and one at its end."""
    out = Path(shell.folder / method)
    if not out.exists():
        words = ["model=llama", f"model.path={base}", *shell.data, *STEPS, *KEEP, *METHODS[method], f"out='{out}'"]
        done = shell.inside(*words)
        assert (done.code, done.err) == (0, "")
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def export(shell: Any, *words: str) -> Path:
    """Where a successful export has written to."""
    done = shell.inside("export", *words)
    assert (done.code, done.err) == (0, "")
    return Path(re.findall(r"^(?:adapter|model|merged): (.*)$", done.out, re.MULTILINE)[0])


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "lora")]
)
def test_the_last_checkpoint_is_what_the_run_left(shell: Any, base: Path, method: str) -> None:
    out = trained(shell, base, method)
    checkpoint = out / "checkpoints" / "step-00000004"
    name = "model" if "full" in method else "adapter"
    once = export(shell, f"checkpoint={checkpoint}", f"dest={method}.1")
    again = export(shell, f"run={out}", f"dest={method}.2")
    assert contents(once) == contents(again) == contents(out / name)
    merged = export(shell, f"run={out}", f"dest={method}.3", "merged=true")
    assert contents(merged) == contents(out / "model")
    assert sorted(contents(merged)) != sorted(contents(once)) or name == "model"


def test_any_checkpoint_loads_in_peft_with_our_logits(shell: Any, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out, tokens = trained(shell, base, "lora"), torch.arange(3, 60)[None]
    found = {}
    for step in (2, 4):
        dest = export(shell, f"checkpoint={out}/checkpoints/step-{step:08d}", f"dest=peft{step}")
        with torch.no_grad():
            theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), dest)
            found[step] = theirs.eval()(tokens).logits
            ours = tuner.load_model(base, dtype=torch.float32, adapter=dest)(tokens)
        torch.testing.assert_close(ours, found[step], rtol=1e-4, atol=1e-4)  # fp32, sums in another order
    assert (found[2] - found[4]).abs().max() > 0.01


@pytest.mark.slow
def test_merged_is_what_merge_writes_on_either_base(shell: Any, base: Path) -> None:
    out = trained(shell, base, "qlora in bf16")
    words = [f"checkpoint={out}/checkpoints/step-00000002"]
    written = {}
    for merge_into in ("dequantized", "original"):
        dest = export(shell, *words, f"dest=exported {merge_into}", f"merge_into={merge_into}", "merged=true")
        done = shell.inside("merge", *words, f"dest=merged {merge_into}", f"merge_into={merge_into}")
        assert (done.code, done.err) == (0, "")
        assert contents(dest) == contents(shell.folder / f"merged {merge_into}")
        written[merge_into] = load_file(dest / "model.safetensors")
    same = [name for name, tensor in written["original"].items() if tensor.equal(written["dequantized"][name])]
    assert 0 < len(same) < len(written["original"])  # embeddings and norms, and not what was quantized


@pytest.mark.slow
def test_a_run_that_goes_on_from_an_adapter(shell: Any, base: Path) -> None:
    first, out = trained(shell, base, "lora"), shell.folder / "further"
    done = shell.inside(*shell.data, *STEPS, *KEEP, f"adapter={first}/adapter", f"out={out}")
    assert (done.code, done.err) == (0, "")
    assert contents(export(shell, f"run={out}", "dest=further.1")) == contents(out / "adapter")
    assert contents(out / "adapter") != contents(first / "adapter")


def test_a_killed_run_has_no_results_and_can_be_exported(shell: Any, base: Path) -> None:
    """What is there after a kill: checkpoints, and neither results nor a summary."""
    finished, killed = trained(shell, base, "lora"), shell.folder / "killed"
    shutil.copytree(finished, killed, ignore=shutil.ignore_patterns("adapter", "model", "summary.json"))
    shutil.rmtree(killed / "checkpoints" / "step-00000004")
    expected = contents(export(shell, f"checkpoint={finished}/checkpoints/step-00000002", "dest=middle"))
    found = contents(export(shell, "run=killed", "dest=of killed"))
    assert found.keys() == expected.keys()
    differing = [name for name in found if found[name] != expected[name]]
    assert differing == ["tuner.json"]  # which names the run folder


def test_a_stopped_run_prints_the_command(shell: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Speed.add

    def interrupted(speed: Speed, tokens: int, seconds: float) -> None:
        add(speed, tokens, seconds)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Speed, "add", interrupted)
    words = ["model=llama", f"model.path={base}", *shell.data, *STEPS, "out='a (stopped) run'"]
    done = shell.inside(*words)
    assert done.code == 130
    log = (shell.folder / "a (stopped) run" / "run.log").read_text()
    (command,) = re.findall(r"python -m tuner (export .*)", log)
    assert contents(export(shell, *shlex.split(command)[1:])).keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tuner.json",
    }


def test_what_cannot_be_exported_is_one_line(shell: Any, base: Path) -> None:
    out = trained(shell, base, "lora")
    empty, damaged = shell.folder / "without", shell.folder / "damaged"
    for folder in (empty, damaged):
        shutil.copytree(out, folder)
    shutil.rmtree(empty / "checkpoints")
    (damaged / "checkpoints" / "step-00000004" / "trainable.safetensors").write_bytes(b"\0" * 64)
    (shell.folder / "taken").mkdir()
    (shell.folder / "taken" / "file").touch()
    cases = {
        "": "say checkpoint=DIR, a folder under checkpoints/ of a run, or run=DIR for its newest",
        f"run={out} checkpoint={out}/checkpoints/step-00000004": "say checkpoint=DIR",
        "checkpoint=nowhere": "nowhere: no checkpoint; expected <run>/checkpoints/step-",
        "run=nowhere": f"run={shell.folder}/nowhere: no checkpoint in it; expected {shell.folder}/nowhere/checkpoints/",
        f"run={empty}": "no checkpoint in it",
        f"checkpoint={damaged}/checkpoints/step-00000004": "step-00000004: damaged: trainable.safetensors: 64 bytes of",
        f"run={out} dest=taken": f"dest={shell.folder}/taken exists and is not empty",
        f"run={out} merge_into=both": "merge_into=both: expected one of dequantized, original",
        f"adapter={out}/adapter": "adapter",
    }
    for words, said in cases.items():
        dest = [] if "dest=" in words else ["dest=never"]
        done = shell.inside("export", *words.split(), *dest)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), (words, done)
        assert done.err.startswith("error: ")
        assert said in done.err
        assert not (shell.folder / "never").exists()
    assert not list(shell.folder.glob(".*.unfinished"))
    older = shell.inside("export", f"run={damaged}", "dest=older")
    assert (older.code, older.err.count("\n")) == (0, 1)
    assert "it is left out, step-00000002 is whole" in older.err
    assert older.out.startswith(f"checkpoint: {damaged}/checkpoints/step-00000002\n")
    nothing = shell.inside("merge", f"model.path={base}", "model=llama", "dest=never")
    assert "tuner export" in nothing.err
