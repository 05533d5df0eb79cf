"""Checkpoints, weights and adapters may be anyone's: a pickle that would run code runs none, whatever is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tuner.tokenizers.tiny import write_tiny_tokenizer

STEPS = ["train.max_steps=2", "train.num_samples=0", "train.num_threads=1", "logger=none", "data.max_samples=40"]


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.file}'",)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The file that must not be there in the end."""
    return tmp_path / "ran"


def saved_by_torch(file: Path, trace: Path) -> None:
    """As `torch.save` writes since 1.6, a pickle in a zip file, with what else the file should hold."""
    torch.save({"step": 2, "model": Touch(trace)}, file)


def plain_pickle(file: Path, trace: Path) -> None:
    file.write_bytes(pickle.dumps(Touch(trace)))


WRITERS = [saved_by_torch, pytest.param(plain_pickle, marks=pytest.mark.slow)]


@pytest.mark.parametrize("write", WRITERS)
def test_the_payload_works_where_it_is_let(tmp_path: Path, trace: Path, write: Any) -> None:
    """Or the tests below could not fail."""
    write(tmp_path / "file", trace)
    if write is saved_by_torch:
        torch.load(tmp_path / "file", weights_only=False)
    else:
        pickle.loads((tmp_path / "file").read_bytes())
    assert trace.exists()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=352, max_position_embeddings=1024, **shape)).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def words(shell: Any, base: Path) -> list[str]:
    return ["model=llama", f"model.path={base}", *shell.data, *STEPS, "peft.lora_rank=2"]


@pytest.fixture(scope="module")
def finished(shell: Any, words: list[str]) -> Path:
    done = shell.inside(*words, "out=finished")
    assert (done.code, done.err) == (0, "")
    return Path(shell.folder / "finished")


@pytest.fixture
def foreign(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run whose results are still to be written, so that it is continued from its checkpoint."""
    folder = Path(shutil.copytree(finished, tmp_path / "foreign", ignore=shutil.ignore_patterns("summary.json")))
    frozen = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(frozen.replace(str(finished), str(folder)))
    return folder


def assert_refused(done: Any, trace: Path, *said: str) -> None:
    assert not trace.exists()
    assert (done.code, done.err.count("\n")) == (2, 1), done
    assert done.err.startswith("error: ")
    assert all(part in done.err for part in said), done.err


def verbs_on(run: Path) -> list[list[str]]:
    checkpoint = f"checkpoint={run}/checkpoints/step-00000002"
    return [
        ["evaluate", checkpoint],
        ["export", checkpoint, f"dest={run}/there"],
        ["merge", checkpoint, f"dest={run}/merged"],
    ]


def vouched_for(file: Path) -> None:
    """Make the manifest beside a file say that it is the right one, as whoever wrote both would."""
    manifest = json.loads((file.parent / "manifest.json").read_text())
    content = file.read_bytes()
    manifest["files"][file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (file.parent / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", ["training.pt", pytest.param("trainable.safetensors", marks=pytest.mark.slow)])
def test_a_file_of_a_checkpoint(
    shell: Any, words: list[str], foreign: Path, trace: Path, write: Any, name: str
) -> None:
    file = foreign / "checkpoints" / "step-00000002" / name
    write(file, trace)
    going_on = [*words, f"out={foreign}"]
    for verb in (going_on, *verbs_on(foreign)):
        assert_refused(shell.inside(*verb), trace, f"{file.parent}: damaged: {name}: ")
    vouched_for(file)
    assert_refused(shell.inside(*going_on), trace, f"{file}: damaged: ")
    for verb in verbs_on(foreign):
        done = shell.inside(*verb)
        if name == "training.pt":  # the weights are all that is read
            assert not trace.exists()
            assert (done.code, done.err) == (0, "")
        else:
            assert_refused(done, trace, f"{file}: damaged: ")


@pytest.mark.parametrize("write", WRITERS)
def test_a_bin_folder(shell: Any, base: Path, tmp_path: Path, trace: Path, write: Any) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "bin"))
    (folder / "model.safetensors").unlink()
    write(folder / "pytorch_model.bin", trace)
    for verb in (
        [*shell.data, *STEPS, "model=llama", f"model.path={folder}", f"out={tmp_path}/out"],
        ["evaluate", "model=llama", f"model.path={folder}", *shell.data],
        ["generate", "model=llama", f"model.path={folder}", "prompt=hi"],
        ["convert", f"source={folder}", f"dest={tmp_path}/there"],
    ):
        assert_refused(shell.inside(*verb), trace, f"{folder}/pytorch_model.bin: ")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "there").exists()


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_an_adapter(
    shell: Any, words: list[str], foreign: Path, tmp_path: Path, trace: Path, write: Any, name: str
) -> None:
    adapter = foreign / "adapter"
    (adapter / "adapter_model.safetensors").unlink()
    write(adapter / name, trace)
    for verb in (
        [*shell.data, *STEPS, f"adapter={adapter}", f"out={tmp_path}/out"],
        ["evaluate", f"run={foreign}"],
        ["generate", f"adapter={adapter}", "prompt=hi"],
        ["merge", f"adapter={adapter}", f"dest={tmp_path}/there"],
    ):
        assert_refused(shell.inside(*verb), trace, str(adapter / "adapter_model.safetensors"))
    if name.endswith(".bin"):
        assert "adapter_model.bin is a pickle" in shell.inside("evaluate", f"run={foreign}").err


CALLS = {
    "quantization": {"_target_": "os.system", "command": "touch {trace}"},
    "model": {"_target_": "subprocess.call", "args": ["touch", "{trace}"]},
    "data": {"_target_": "posix.system", "command": "touch {trace}"},
    "peft": {"_target_": "builtins.exec", "source": "open('{trace}', 'w')"},
    "precision": {"_target_": "builtins.eval", "source": "open('{trace}', 'w')"},
    "logger": {"_target_": "tuner.logging.none.NoLogger", "more": [{"_target_": "os.system"}]},
}


@pytest.mark.slow
@pytest.mark.parametrize("group", CALLS)
def test_a_configuration_of_a_run(shell: Any, foreign: Path, trace: Path, group: str) -> None:
    config = yaml.safe_load((foreign / "config.yaml").read_text())
    config["trust_targets"] = ["os", "subprocess", "builtins", "posix"]
    config[group] = json.loads(json.dumps(CALLS[group]).replace("{trace}", str(trace)))
    (foreign / "config.yaml").write_text(yaml.safe_dump(config))
    for verb in (*verbs_on(foreign), ["evaluate", f"run={foreign}"], ["export", f"run={foreign}", "dest=there"]):
        done = shell.inside(*verb)
        assert not trace.exists()
        assert (done.code, done.out) == (2, "")
        assert "_target_=" in done.err
        assert "not among the classes" in done.err


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch {trace}']", "a: !!python/name:os.system ''"])
def test_yaml_that_names_objects(shell: Any, words: list[str], foreign: Path, trace: Path, text: str) -> None:
    (foreign / "config.yaml").write_text(text.replace("{trace}", str(trace)) + "\n")
    assert_refused(shell.inside("evaluate", f"run={foreign}"), trace, "config.yaml: not a configuration")
    assert_refused(shell.inside(*words, f"out={foreign}"), trace, "config.yaml")


TARGETS = [
    ["optimizer._target_=os.system"],
    ["model._target_=subprocess.call"],
    ["data._target_=os.system"],
    ["peft._target_=builtins.exec"],
    ["schedule._target_=os.system"],
    ["checkpoint._target_=shutil.rmtree"],
    ["distributed._target_=os.system"],
    ["logger._target_=os.system"],
    ["+logger.more={_target_:os.system,command:'touch {trace}'}"],
    ["+data.more=[{_target_:subprocess.call,args:[touch,'{trace}']}]"],
    ["+model.rope_scaling._target_=os.system"],
    ["optimizer=custom", "optimizer._target_=os.system"],
    ["optimizer=custom", "optimizer._target_=torch.optim.adam.torch.os.system"],
]


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_a_target_on_the_command_line(shell: Any, words: list[str], trace: Path, targets: list[str]) -> None:
    said = [word.replace("{trace}", str(trace)) for word in targets]
    done = shell.inside(*words, *said, "out=never")
    assert not trace.exists()
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err
    assert "_target_=" in done.err
    assert not (shell.folder / "never").exists()
