"""What a person can get wrong: one clear line, exit code 2, nothing left on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.tokenizers.tiny import write_tiny_tokenizer

QUICK = ["train.max_steps=2", "logger=none", "train.num_samples=0", "train.num_threads=1"]
GROUPS_AND_A_KEY = {
    "model": ("hiden_size", "did you mean hidden_size?"),
    "data": ("max_seqlen", "did you mean max_seq_len"),
    "peft": ("lora_rnk", "did you mean lora_rank"),
    "quantization": ("blocksize", "no such key"),
    "precision": ("trainabl", "did you mean trainable?"),
    "memory": ("activation_checkpoint", "did you mean activation_checkpointing or activation_offloading?"),
    "optimizer": ("weight_dcay", "did you mean weight_decay?"),
    "schedule": ("min_lr", "did you mean min_lr_ratio?"),
    "distributed": ("ranks", "no such key"),
    "checkpoint": ("asynchronos", "did you mean asynchronous?"),
    "logger": ("experment", "no such key"),
    "train": ("max_step", "did you mean max_steps?"),
}
KEY_CASES = [
    ([f"{sign}{group}.{key}=1"], f"{group}.{key}=1: no such key", hint)
    for group, (key, hint) in GROUPS_AND_A_KEY.items()
    for sign in ("", "+")
]
OPTION_CASES = [
    ([f"{group}=nonesuch"], f"{group}=nonesuch: no such option", "valid: ")
    for group in GROUPS_AND_A_KEY
    if group not in ("train", "data")
]
VALUE_CASES = [
    (["seeed=1"], "seeed=1: no such key", "did you mean seed or sweep?"),
    (["seed=abc"], "seed=abc: expected a whole number", ""),
    (["train.batch_size=1.5"], "train.batch_size=1.5: expected a whole number > 0", ""),
    (["train.compile=maybe"], "train.compile=maybe: expected true or false", ""),
    (["optimizer.lr=-1"], "optimizer.lr=-1: expected a number > 0", ""),
    (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9]: must be two numbers", ""),
    (["peft.lora_rank=0"], "peft.lora_rank=0: expected a whole number > 0", ""),
    (["peft.lora_rank=33"], "peft.lora_rank=33: larger than", "valid: 1 to 32"),
    (["peft.lora_attn_modules=[wq]"], 'peft.lora_attn_modules=["wq"]', "q_proj, k_proj, v_proj, output_proj"),
    (["peft=qlora", "quantization=none"], "peft=qlora quantization=none", "say peft=lora"),
    (["peft=full", "quantization=nf4"], "peft=full quantization=nf4", "say peft=qlora"),
    (["peft=full", "precision.trainable=bf16"], "precision.trainable=bf16 precision=fp32 peft=full", "say precision"),
    (
        ["model.tie_word_embeddings=true", "peft.apply_lora_to_output=true"],
        "peft.apply_lora_to_output=true",
        "output layer is its embedding matrix",
    ),
    (["optimizer._target_=os.system"], "optimizer._target_=os.system: not among the classes", "torch.optim.<Class>"),
    (
        ["optimizer=custom", "optimizer._target_=torch.optim.RAdamm"],
        "optimizer._target_=torch.optim.RAdamm: torch.optim has no such optimizer",
        "did you mean RAdam",
    ),
    (["optimizer._target_=torch.optim.RAdam"], "optimizer.fused=True", "~optimizer.fused takes the key away"),
    (["out=one", "-m", "seed=1,2"], "out=... together with --multirun", "hydra.sweep.dir=FOLDER"),
    (["-m", "seed=1,2", "out=one"], "out=... together with --multirun", "hydra.sweep.dir=FOLDER"),
    (["out="], "out=: expected the name of a run folder", ""),
    (["--quiet"], "unrecognized arguments: --quiet", ""),
    (["data.max_seq_len=5000"], "data.max_seq_len=5000: longer than the model's context, 2048", ""),
    (["data.max_seq_len=4"], "within data.max_seq_len=4 tokens", "raise it"),
    (["data.path=nowhere.jsonl"], "nowhere.jsonl does not exist", ""),
    (["model.num_key_value_heads=3"], "model.num_key_value_heads=3 does not divide num_attention_heads=4", ""),
    (["model=llama", "model.path=nowhere"], "no such folder", "Hugging Face folder"),
]
CASES = [*KEY_CASES, *OPTION_CASES, *VALUE_CASES]


def assert_one_clear_line(shell: Any, done: Any, start: str, *parts: str) -> None:
    """Exit code 2, one `error: ` line with all of this, and a folder as it was."""
    assert done.code == 2, (done.out, done.err)
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    assert done.err.endswith("\n")
    assert "Traceback" not in done.err
    assert all(part in done.err for part in (start, *parts)), done.err
    assert sorted(path.name for path in shell.folder.iterdir()) == ["sums.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "start", "part"), CASES, ids=[" ".join(words) for words, _, _ in CASES])
def test_words(shell: Any, words: list[str], start: str, part: str) -> None:
    done = shell.inside("model=tiny", *shell.data, *QUICK, *words)
    assert_one_clear_line(shell, done, start, part)


def test_several_problems_are_several_lines(shell: Any) -> None:
    done = shell.inside("model=tiny", *shell.data, "optimizer.lr=-1", "peft.lora_rank=0", "optimiser=sgd")
    assert done.code == 2
    assert [line.split(":")[1].strip() for line in done.err.splitlines()] == [
        "optimiser=sgd",
        "peft.lora_rank=0",
        "optimizer.lr=-1",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_is_not_there(shell: Any) -> None:
    done = shell.inside("model=tiny", *shell.data, *QUICK, "device=cuda")
    assert_one_clear_line(shell, done, "device=cuda", "valid here: auto, cpu")


@pytest.mark.slow
def test_compiling_without_a_compiler(shell: Any, tmp_path: Path) -> None:
    done = shell("model=tiny", *shell.data, *QUICK, "train.compile=true", PATH=str(tmp_path), CXX="")
    assert_one_clear_line(shell, done, "train.compile=true: torch.compile finds no C++ compiler here")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=352, max_position_embeddings=512, num_key_value_heads=2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


def cut(name: str, size: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[:size])

    return damage


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def written(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def changed(**keys: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))

    return damage


def an_index_that_names_a_missing_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def a_damaged_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[")


FOLDERS = {
    "weights missing": (without("model.safetensors"), "no model.safetensors and no model.safetensors.index.json"),
    "weights truncated": (cut("model.safetensors", 100_000), "model.safetensors: truncated, 100000 of "),
    "header truncated": (cut("model.safetensors", 5), "model.safetensors: truncated, 5 bytes"),
    "weights garbled": (written("model.safetensors", "\0" * 100), "model.safetensors: no safetensors file"),
    "a shard missing": (an_index_that_names_a_missing_file, "missing model-00001-of-00002.safetensors"),
    "index damaged": (a_damaged_index, "model.safetensors.index.json: damaged"),
    "config missing": (without("config.json"), "no config.json in it"),
    "config damaged": (written("config.json", "{"), "config.json is not JSON"),
    "another size": (
        changed(hidden_size=128),
        "weights do not fit config.json: lm_head.weight is [352, 64] and should",
    ),
    "another family": (changed(model_type="gpt2"), "model_type=gpt2 is not supported; valid: gemma, gemma2, llama, "),
    "tokenizer missing": (without("tokenizer.json"), "no tokenizer.json"),
    "tokenizer damaged": (written("tokenizer.json", "{"), "tokenizer.json cannot be read as a tokenizer"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "part"), FOLDERS.values(), ids=FOLDERS)
def test_model_folders(shell: Any, llama: Path, tmp_path: Path, damage: Callable[[Path], None], part: str) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    damage(folder)
    done = shell.inside("model=llama", f"model.path={folder}", *shell.data, *QUICK)
    assert_one_clear_line(shell, done, str(folder), part)
    assert len(done.err) < 1100  # every tensor of a model of another size, those of all layers said once


def test_the_tokenizer_of_another_model(shell: Any, llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = shutil.copytree(llama, tmp_path / "llama")
    config = LlamaConfig.from_pretrained(llama)
    config.vocab_size = 200
    LlamaForCausalLM(config).save_pretrained(folder)
    done = shell.inside("model=llama", f"model.path={folder}", *shell.data, *QUICK)
    assert_one_clear_line(shell, done, str(folder), "its embedding has 200 rows")
    done = shell.inside("generate", "model=llama", f"model.path={folder}", "prompt=hello")
    assert_one_clear_line(shell, done, str(folder), "its embedding has 200 rows")


def test_an_adapter_on_a_tied_head_and_a_rank_too_large_in_a_folder(shell: Any, llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    done = shell.inside("model=llama", f"model.path={folder}", *shell.data, *QUICK, "peft.lora_rank=40")
    assert_one_clear_line(shell, done, "peft.lora_rank=40", "valid: 1 to 32")
    changed(tie_word_embeddings=True)(folder)
    words = ["model=llama", f"model.path={folder}", "peft.apply_lora_to_output=true"]
    assert_one_clear_line(shell, shell.inside(*words, *shell.data, *QUICK), "peft.apply_lora_to_output=true")


GOOD_LINE = json.dumps({"instruction": "Say a.", "input": "", "output": "a"})
DATA = {
    "not JSON": (f"{GOOD_LINE}\n{{oops\n", ":2: not valid JSON"),
    "empty": ("", "the file holds no examples"),
    "other columns": ('{"question": "a", "answer": "b"}\n', ":1: no column 'instruction'; found: question, answer"),
    "one example": (GOOD_LINE + "\n", "1 usable example of 1 read"),
    "not text": ('{"instruction": 3, "input": "", "output": "b"}\n', ":1: "),
}


@pytest.mark.slow
@pytest.mark.parametrize(("text", "part"), DATA.values(), ids=DATA)
def test_datasets(shell: Any, tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    done = shell.inside("model=tiny", "data=alpaca", f"data.path={file}", *QUICK)
    assert_one_clear_line(shell, done, part, "alpaca" if "usable" in part else str(file))


@pytest.mark.slow
def test_a_sample_longer_than_the_context_as_too_long_says(shell: Any, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    rows = [
        {"instruction": f"Say {i}.", "input": "", "output": "on and on " * (200 if i == 7 else 1)} for i in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["model=tiny", "data=alpaca", f"data.path={file}", *QUICK]
    refused = shell.inside(*words, "data.too_long=refuse")
    assert_one_clear_line(shell, refused, f"{file}:8: ", "data.max_seq_len=512")
    out = tmp_path / "out"
    truncated = shell.inside(*words, f"out={out}")
    assert (truncated.code, "1 truncated" in " ".join(truncated.out.split())) == (0, True)
    assert json.loads((out / "environment.json").read_text())["dataset"]["counts"]["truncated"] == 1


def test_a_run_folder_that_cannot_be_made(shell: Any) -> None:
    words = ["model=tiny", *shell.data, *QUICK]
    done = shell.inside(*words, "out=sums.jsonl/run")
    assert_one_clear_line(shell, done, f"out={shell.folder}/sums.jsonl/run: cannot be made a run folder")
    assert_one_clear_line(shell, shell.inside(*words, "out=sums.jsonl"), "cannot be made a run folder: File exists")


VERBS = [
    (["rum"], "rum: no such verb; did you mean run?"),
    (["generate"], "say prompt=TEXT, or prompts=FILE"),
    (["generate", "prompt=hi", "run=nowhere"], "nowhere: no config.yaml, so this is no run folder"),
    (["generate", "prompt=hi", "model=tiny", "adapter=nowhere"], "nowhere: no adapter_config.json"),
    (["evaluate", "model=tiny", "checkpoint=nowhere"], "nowhere: no checkpoint; expected <run>/checkpoints/step-"),
    (["evaluate", "run=a", "adapter=b"], "run and adapter: give one of them"),
    (["merge", "model=tiny", "dest=there"], "nothing to merge"),
    (["merge", "model=tiny", "dest=sums.jsonl"], "sums.jsonl exists and is not empty"),
    (["sync", "nowhere"], "nowhere is not a run folder: it has no config.yaml"),
    (["sync"], "sync takes DIR"),
]


@pytest.mark.parametrize(("words", "part"), VERBS, ids=[" ".join(words) for words, _ in VERBS])
def test_verbs(shell: Any, words: list[str], part: str) -> None:
    assert_one_clear_line(shell, shell.inside(*words), part)


@pytest.mark.slow
def test_the_shell_sees_the_same_and_a_traceback_only_on_demand(shell: Any, llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    cut("model.safetensors", 100_000)(folder)
    words = ["model=llama", f"model.path={folder}", *shell.data, *QUICK]
    started = [
        shell.start(*words),
        shell.start(*words, "out=full", HYDRA_FULL_ERROR="1"),
        shell.start(*words, "out=debug", "--debug"),
    ]
    plain, *full = [shell.end(process) for process in started]
    assert_one_clear_line(shell, plain, f"error: {folder}/model.safetensors: truncated")
    for done in full:
        assert (done.code, done.err.startswith("Traceback")) == (2, True)
        assert done.err.splitlines()[-1].startswith(f"error: {folder}/model.safetensors: truncated")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many KiB; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tuner-test", str(folder)]
        if (
            os.name != "posix"
            or shutil.which("mount") is None
            or subprocess.run(command, capture_output=True).returncode
        ):
            pytest.skip("may not mount a small file system here")
        mounted.append(folder)
        return folder

    yield mount
    for one in mounted:
        subprocess.run(["umount", str(one)], check=True)


def test_a_disk_too_small_for_the_checkpoint_is_refused_before_training(
    shell: Any, disk: Callable[[int], Path]
) -> None:
    folder = disk(256)
    done = shell.inside("model=tiny", *shell.data, *QUICK, "peft=full", f"out={folder}/run")
    assert_one_clear_line(shell, done, "no room for a checkpoint and the results: they may take ", "has 0.2 MiB free")
    assert list(folder.iterdir()) == []


def test_a_disk_too_small_for_two_checkpoints_at_a_time_is_refused(shell: Any, disk: Callable[[int], Path]) -> None:
    folder = disk(2500)
    words = ["model=tiny", *shell.data, *QUICK, "peft=full", "checkpoint.every_steps=1"]
    done = shell.inside(*words, f"out={folder}/run")
    assert_one_clear_line(shell, done, "no room for 2 checkpoints and the results: they may take ")
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_run_whose_checkpoints_find_no_room_goes_on_where_that_is_asked_for(
    shell: Any, disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """150 KiB are too few for a checkpoint of 270 KiB and enough for metrics and the adapter."""
    from tuner.checkpoint.store import CheckpointStore

    folder = disk(4000)
    save = CheckpointStore.save

    def fill_then_save(self: CheckpointStore, state: Any, val_loss: float | None, **more: bool) -> Path:
        if state.step == 4:
            free = shutil.disk_usage(folder).free
            (folder / "somebody else's").write_bytes(b"\1" * (free - 150 * 1024))
        return save(self, state, val_loss, **more)

    monkeypatch.setattr(CheckpointStore, "save", fill_then_save)
    words = ["model=tiny", *shell.data, "logger=none", "train.num_samples=0", "train.max_steps=6", "peft=lora"]
    words += ["train.num_threads=1", "checkpoint.every_steps=2", "checkpoint.keep_last=3", f"out={folder}/run"]
    done = shell.inside(*words, "checkpoint.on_error=continue")
    assert (done.code, done.err) == (0, "")
    out = " ".join(done.out.split())
    for step in (4, 6):
        assert "not saved, training goes on (checkpoint.on_error=continue): " in out
        assert f"step-0000000{step}: cannot be written: " in out
    saved = folder / "run" / "checkpoints"
    assert [path.name for path in saved.iterdir()] == ["step-00000002"]
    assert json.loads((folder / "run" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("kib_left", [0, 300])
def test_a_disk_that_fills_up_says_what_remains(
    shell: Any, disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, kib_left: int
) -> None:
    """Somebody else fills the disk after the second step's checkpoint."""
    from tuner.checkpoint.store import CheckpointStore

    folder = disk(8000)
    save = CheckpointStore.save

    def save_then_fill(self: CheckpointStore, state: Any, val_loss: float | None, **more: bool) -> Path:
        saved = save(self, state, val_loss, **more)
        if state.step == 2:
            free = shutil.disk_usage(folder).free
            (folder / "somebody else's").write_bytes(b"\1" * (free - kib_left * 1024))
        return saved

    monkeypatch.setattr(CheckpointStore, "save", save_then_fill)
    words = [
        "model=tiny",
        *shell.data,
        "logger=none",
        "train.num_samples=0",
        "train.max_steps=6",
        "peft=full",
        "train.num_threads=1",
    ]
    words += ["checkpoint.every_steps=2", "checkpoint.asynchronous=false", f"out={folder}/run"]
    done = shell.inside(*words)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert "o space left on device" in done.err or "no room left on the disk" in done.err
    checkpoint = folder / "run" / "checkpoints" / "step-00000002"
    assert f"{checkpoint} is whole, and the same command with out={folder}/run continues from it" in done.err
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-00000002"]
    # The folder says so too, in the one file that needs no room where there is none for the summary.
    files = [folder / "run" / name for name in ("summary.json", "heartbeat.json")]
    ends = [json.loads(file.read_text()) for file in files if file.exists()]
    assert len(ends) == 1
    assert "o space left on device" in ends[0]["reason"]
    assert ends[0]["resume"].endswith(f"out={folder}/run")

    monkeypatch.undo()
    (folder / "somebody else's").unlink()
    again = shell.inside(*words)
    assert (again.code, "resumed at step 2 of 6" in again.out) == (0, True)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_bad_rows_are_listed_or_left_out_and_counted(shell: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    rows = [f"Say {i}.,{i}" if i % 10 else f"Say {i}." for i in range(40)]
    file.write_text("ask,reply\n" + "\n".join(rows) + "\n")
    words = ["model=tiny", "data=instruct", f"data.path={file}", "data.prompt_column=ask", *QUICK]
    refused = shell.inside(*words, "data.response_column=reply")
    assert refused.code == 2
    assert refused.err.splitlines() == [
        "error: instruct: 4 bad rows in 40 rows, more than data.max_bad_rows=0:",
        *(f"error:   {file}:{line}: 1 column where the first line names 2" for line in (2, 12, 22, 32)),
    ]
    misnamed = shell.inside(*words, "data.response_column=replies", "data.max_bad_rows=4")
    assert misnamed.code == 2
    assert f"{file}:3: no column 'replies'; found: ask, reply" in misnamed.err
    out = tmp_path / "out"
    for cache in ("prepared", "found in the cache"):
        done = shell.inside(
            *words, "data.response_column=reply", "data.max_bad_rows=4", f"out={out}/{cache}", TUNER_CACHE=str(tmp_path)
        )
        assert done.code == 0
        assert [line.split(": ")[1] for line in done.err.splitlines()] == [
            f"{file}:{line}" for line in (2, 12, 22, 32)
        ], cache
        counts = json.loads((out / cache / "environment.json").read_text())["dataset"]["counts"]
        assert (counts["bad_rows"], counts["examples"]) == (4, 36)
