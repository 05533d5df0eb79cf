"""A run or adapter folder that a verb is given may be anyone's: it decides no code, and it decides the base it saw."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sweeper.__main__ import dispatch as sweeper
from sweeper.trial import command
from tuner.errors import TunerError
from tuner.tokenizers.tiny import write_tiny_tokenizer
from tuner.types import Precision

STEPS = ["train.max_steps=2", "train.num_samples=0", "train.num_threads=1", "logger=none"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as transformers saves it, with settings for generation."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=352, max_position_embeddings=1024, initializer_range=0.3, **shape))
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.25)
    model.save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def run(shell: Any, base: Path) -> Path:
    """A QLoRA run in bf16 over the base."""
    words = ["model=llama", f"model.path={base}", *shell.data, *STEPS, "peft=qlora", "precision=bf16"]
    done = shell.inside(*words, "optimizer.lr=0.02", "out=run")
    assert (done.code, done.err) == (0, "")
    return Path(shell.folder / "run")


def loss_of(done: Any) -> float:
    assert (done.code, done.err) == (0, "")
    (loss,) = re.findall(r"^val_loss: (.*)$", done.out, re.MULTILINE)
    return float(loss)


@pytest.mark.slow
def test_an_adapter_meets_the_base_it_was_trained_on(shell: Any, run: Path) -> None:
    """The base was made bf16 before it was quantized: from fp32 weights it would be another one."""
    facts = json.loads((run / "adapter" / "tuner.json").read_text())
    assert (facts["quantization"]["name"], facts["precision"]) == ("nf4", "bf16")
    of_run = loss_of(shell.inside("evaluate", f"run={run}"))
    of_adapter = loss_of(shell.inside("evaluate", f"adapter={run}/adapter", *shell.data))
    assert of_adapter == of_run
    assert loss_of(shell.inside("evaluate", f"adapter={run}/adapter", *shell.data, "precision=fp32")) != of_run
    assert loss_of(shell.inside("evaluate", f"adapter={run}/adapter", *shell.data, "quantization=none")) != of_run


def test_a_precision_that_the_device_lacks_is_said(shell: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tuner.verbs.source.resolve",
        lambda asked, device: (Precision("fp32", "float32"), "precision: no bfloat16 here"),
    )
    done = shell.inside("evaluate", f"run={run}")
    assert (done.code, done.err) == (0, "precision: no bfloat16 here\n")


def test_the_base_s_settings_for_generation_go_along(shell: Any, run: Path, base: Path) -> None:
    done = shell.inside("merge", f"run={run}", "dest=merged")
    assert (done.code, done.err) == (0, "")
    settings = (shell.folder / "merged" / "generation_config.json").read_text()
    assert settings == (base / "generation_config.json").read_text()
    assert json.loads(settings)["temperature"] == 0.25


@pytest.fixture
def foreign(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, beside a module whose import and call both leave a trace."""
    trace = "from pathlib import Path\n\n\ndef ran(**keys):\n    Path({trace!r}).touch()\n\n\nran()\n"
    (tmp_path / "payload.py").write_text(trace.format(trace=str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(str(tmp_path))
    return Path(shutil.copytree(run, tmp_path / "foreign"))


def assert_refused(done: Any, foreign: Path, *parts: str) -> None:
    assert not (foreign.parent / "ran").exists()
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    assert all(part in done.err for part in parts), done.err


@pytest.mark.parametrize("where", ["quantization", "model", "precision", "data"])
def test_a_run_folder_gives_itself_no_trust(shell: Any, foreign: Path, where: str) -> None:
    config = yaml.safe_load((foreign / "config.yaml").read_text())
    config["trust_targets"] = ["payload", "torch", "torch.hub"]
    config[where]["_target_"] = "payload.ran"
    (foreign / "config.yaml").write_text(yaml.safe_dump(config))
    done = shell.inside("evaluate", f"run={foreign}")
    assert_refused(done, foreign, f"{where}._target_=payload.ran: not among the classes", "an entry of trust_targets")


def test_torch_hub_is_not_reached(shell: Any, foreign: Path) -> None:
    (foreign / "hubconf.py").write_text("import payload\n\n\ndef entry():\n    payload.ran()\n")
    config = yaml.safe_load((foreign / "config.yaml").read_text())
    config["trust_targets"] = ["torch"]
    call = {"_target_": "torch.hub.load", "repo_or_dir": str(foreign), "model": "entry", "source": "local"}
    config["quantization"] = call
    (foreign / "config.yaml").write_text(yaml.safe_dump(config))
    for verb in (["evaluate"], ["merge", "dest=there"], ["generate", "prompt=hi"]):
        done = shell.inside(*verb, f"run={foreign}")
        assert_refused(done, foreign, "quantization._target_=torch.hub.load: not among the classes")


def test_what_the_command_line_trusts_is_built(shell: Any, foreign: Path) -> None:
    config = yaml.safe_load((foreign / "config.yaml").read_text())
    config["quantization"] = {"_target_": "payload.ran"}
    (foreign / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(AttributeError):  # what it builds is no quantization
        shell.inside("evaluate", f"run={foreign}", "trust_targets=[payload]")
    assert (foreign.parent / "ran").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"name": "nf4", "_target_": "payload.ran"}, "quantization._target_=payload.ran: not among the classes"),
        ({"name": "nf4", "block_size": {"_target_": "payload.ran"}}, "_target_=payload.ran: not among the classes"),
        ({"name": "nf4", "blocksize": 64}, "quantization.blocksize=64: no such key; did you mean block_size"),
        ({"name": "nf5"}, "quantization=nf5: no such option"),
        ({"name": "nf4 +peft=x"}, "tuner.json: damaged: "),
        ({}, "tuner.json: damaged: KeyError: 'name'"),
    ],
    ids=["another target", "a target below", "another key", "another name", "more than a name", "no name"],
)
def test_the_facts_of_an_adapter_are_checked(shell: Any, foreign: Path, keys: dict[str, Any], said: str) -> None:
    facts = {"quantization": keys, "precision": "bf16"}
    (foreign / "adapter" / "tuner.json").write_text(json.dumps(facts))
    assert_refused(shell.inside("evaluate", f"adapter={foreign}/adapter", *shell.data), foreign, said)


@pytest.mark.parametrize("text", ["- a list", "{", "a: ${nowhere}", ""])
def test_a_run_folder_whose_config_is_none_is_refused(shell: Any, foreign: Path, text: str) -> None:
    (foreign / "config.yaml").write_text(text)
    assert_refused(shell.inside("evaluate", f"run={foreign}"), foreign)


@pytest.mark.slow
def test_the_printed_commands_of_a_run_with_trust_repeat_it(
    shell: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the run's own precision comes from a module of the person."""
    module = "from tuner.types import Precision\n\n\ndef half():\n    return Precision('bf16', 'bfloat16', 'auto')\n"
    (tmp_path / "my_precisions.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["model=llama", f"model.path={base}", *shell.data, *STEPS, "out=trusting", "trust_targets=[my_precisions]"]
    done = shell.inside(*words, "~precision.trainable", "precision._target_=my_precisions.half")
    assert (done.code, done.err) == (0, "")
    (command,) = re.findall(r"python -m tuner (evaluate .*)", done.out)
    assert loss_of(shell.inside(*shlex.split(command))) > 0
    (without,) = (word for word in shlex.split(command) if word.startswith("run="))
    refused = shell.inside("evaluate", without)
    assert (refused.code, "precision._target_=my_precisions.half: not among the classes" in refused.err) == (2, True)


@pytest.mark.slow
def test_a_trial_gives_itself_no_trust(
    shell: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep trusts what its command says; whoever runs a trial's folder alone says it again, as it is printed."""
    module = "from tuner.types import Precision\n\n\ndef half():\n    return Precision('bf16', 'bfloat16', 'auto')\n"
    (tmp_path / "my_precisions.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["model=llama", f"model.path={base}", *shell.data, *STEPS, "seed=1,2", "~precision.trainable"]
    trusted = ["trust_targets=[my_precisions]", "precision._target_=my_precisions.half"]
    done = shell.inside("-m", *words, *trusted, "hydra.sweep.dir=trusting_sweep")
    assert done.code == 0, done.err
    out = next(file.parent for file in (shell.folder / "trusting_sweep").glob("*/summary.json"))
    (out / "summary.json").unlink()
    assert command(out) == f"python -m sweeper trial {out} 'trust_targets=[my_precisions]'"
    for more in ([], ["trust_targets=[another]"]):
        with pytest.raises(TunerError, match=r"precision\._target_=my_precisions\.half: not among the classes"):
            sweeper(["trial", str(out), *more])
    for wrong in ("trust_targets=my_precisions", "trust_targets=[1]", "trust_targets=["):
        with pytest.raises(TunerError, match="no list of dotted prefixes, as trust_targets="):
            sweeper(["trial", str(out), wrong])
    with pytest.raises(TunerError, match=r"^trial takes DIR \[trust_targets=\[\.\.\.\]\]; given: "):
        sweeper(["trial", str(out), "seed=3"])
    sweeper(shlex.split(command(out))[3:])
    assert json.loads((out / "summary.json").read_text())["status"] == "finished"
