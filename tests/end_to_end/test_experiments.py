"""Every experiment: what it composes, what it counts, and that it trains, its model made small by `+scale=tiny`."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import tuner
from tuner.verbs.ls import options

pytestmark = pytest.mark.slow

ATTENTION = ("q_proj", "v_proj", "output_proj")
Q_K_V = ("q_proj", "k_proj", "v_proj")
STORED = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
MLP = ("gate_proj", "up_proj", "down_proj")
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
FUSED |= {"up_proj": "gate_up_proj"}


@dataclass(frozen=True)
class Recipe:
    """What an experiment says: its model and that model's published size, and its settings."""

    model: str
    total: int
    method: str
    lr: float = 3e-4
    batch: tuple[int, int] = (2, 8)
    warmup: int | None = 100
    rank: int = 8
    alpha: int = 16
    modules: tuple[str, ...] = ATTENTION
    output: bool = False
    schedule: str = "Cosine"

    @property
    def optimizer(self) -> str:
        return "paged_adamw8bit" if self.method == "full" else "adamw"


LLAMA2_7B = Recipe("llama2_7b", 6_738_415_616, "lora")
LLAMA2_13B = Recipe("llama2_13b", 13_015_864_320, "qlora")
CODE_LLAMA = Recipe("code_llama2_7b", 6_738_546_688, "lora")
LLAMA3 = Recipe("llama3_8b", 8_030_261_248, "lora")
MISTRAL = Recipe("mistral_7b", 7_241_732_096, "lora", 2e-5, (4, 4), rank=64, modules=Q_K_V, output=True)
GEMMA = {"lr": 2e-5, "batch": (4, 4), "warmup": 10, "rank": 64, "alpha": 128, "modules": Q_K_V}
GEMMA_2B = Recipe("gemma_2b", 2_506_172_416, "lora", **GEMMA)  # type: ignore[arg-type]
GEMMA_7B = Recipe("gemma_7b", 8_537_680_896, "lora", **GEMMA)  # type: ignore[arg-type]
PHI3 = Recipe("phi3_mini", 3_821_079_552, "lora")


def full(of: Recipe, lr: float = 2e-5, warmup: int | None = None, schedule: str = "Constant") -> Recipe:
    return Recipe(of.model, of.total, "full", lr, (2, 1), warmup, schedule=schedule)


THE_FIFTEEN = {
    "llama2/7B_lora_single_device": LLAMA2_7B,
    "llama2/7B_qlora_single_device": replace(LLAMA2_7B, method="qlora"),
    "code_llama2/7B_lora_single_device": CODE_LLAMA,
    "code_llama2/7B_qlora_single_device": replace(CODE_LLAMA, method="qlora"),
    "llama3/8B_lora_single_device": LLAMA3,
    "llama3/8B_qlora_single_device": replace(LLAMA3, method="qlora"),
    "llama2/13B_qlora_single_device": LLAMA2_13B,
    "mistral/7B_lora_single_device": MISTRAL,
    "mistral/7B_qlora_single_device": replace(MISTRAL, method="qlora"),
    "gemma/2B_lora_single_device": GEMMA_2B,
    "gemma/2B_qlora_single_device": replace(GEMMA_2B, method="qlora"),
    "gemma/7B_lora_single_device": GEMMA_7B,
    "gemma/7B_qlora_single_device": replace(GEMMA_7B, method="qlora"),
    "phi3/mini_lora_single_device": PHI3,
    "phi3/mini_qlora_single_device": replace(PHI3, method="qlora"),
}
FULL = {
    "llama2/7B_full_low_memory": full(LLAMA2_7B, 1e-5, 100, "Cosine"),
    "code_llama2/7B_full_low_memory": full(CODE_LLAMA),
    "llama3/8B_full_single_device": full(LLAMA3),
    "mistral/7B_full_low_memory": full(MISTRAL, 5e-6),
    "gemma/2B_full": full(GEMMA_2B),
    "phi3/mini_full_low_memory": full(PHI3, 5e-6),
}
SMOLLM2 = Recipe("smollm2_135m", 134_515_008, "lora")
OF_ANY_MODEL = {
    "lora_single_device": SMOLLM2,
    "qlora_single_device": replace(SMOLLM2, method="qlora"),
    "full_single_device": full(SMOLLM2),
}
ALL = {**THE_FIFTEEN, **FULL, **OF_ANY_MODEL}

SHORT = ["train.max_steps=2", "train.epochs=null", "schedule.warmup_steps=0", "train.num_samples=0", "logger=none"]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, shell_in: Callable[[Path], Any]) -> Any:
    return shell_in(tmp_path_factory.mktemp("experiments"))


def test_every_experiment_is_here() -> None:
    assert len(THE_FIFTEEN) == 15
    assert set(options()["experiment"]) == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_it_composes_its_settings(name: str) -> None:
    recipe, cfg = ALL[name], tuner.compose([f"experiment={name}"])
    tuner.check(cfg)
    assert cfg.model == tuner.compose([f"model={recipe.model}"]).model
    assert cfg.data == tuner.compose().data
    assert cfg.quantization._target_.split(".")[-2] == ("nf4" if recipe.method == "qlora" else "none")
    assert (cfg.precision._target_, cfg.precision.trainable) == ("tuner.precision.bf16.bf16", "auto")
    assert cfg.memory.activation_checkpointing == "full"
    assert cfg.optimizer._target_.split(".")[-2] == recipe.optimizer
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (recipe.lr, 0.01)
    assert cfg.schedule._target_.split(".")[-1] == recipe.schedule
    assert cfg.schedule.warmup_steps == (recipe.warmup or 0)
    assert (cfg.train.batch_size, cfg.train.gradient_accumulation_steps) == recipe.batch
    assert (cfg.train.epochs, cfg.train.max_steps, cfg.train.clip_grad_norm) == (1, None, None)
    assert cfg.peft.name == recipe.method
    if recipe.method != "full":
        assert (cfg.peft.lora_rank, cfg.peft.lora_alpha, cfg.peft.lora_dropout) == (recipe.rank, recipe.alpha, 0.0)
        assert tuple(cfg.peft.lora_attn_modules) == recipe.modules
        assert (cfg.peft.apply_lora_to_mlp, cfg.peft.apply_lora_to_output) == (True, recipe.output)


@pytest.mark.parametrize("name", ALL)
def test_validate_counts_its_published_size(name: str, shell: Any) -> None:
    done = shell.inside("validate", f"experiment={name}")
    assert done.code == 0, done.err
    total, trainable = (int(line.partition(": ")[2]) for line in done.out.splitlines())
    assert total == ALL[name].total
    assert (trainable == total) if ALL[name].method == "full" else (0 < trainable < total // 30)


@pytest.mark.parametrize("name", ALL)
def test_it_trains_on_its_model_made_small(name: str, shell: Any) -> None:
    out = f"trained/{name}"
    done = shell.inside(
        f"experiment={name}", "+scale=tiny", *SHORT, *shell.data, "data.max_val_samples=4", f"out={out}"
    )
    assert done.code == 0, done.err
    summary = json.loads((shell.folder / out / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["precision"]) == ("finished", 2, "bf16")
    assert all(math.isfinite(summary[key]) for key in ("train_loss", "val_loss", "val_loss_before"))
    assert 2_000_000 < summary["total_params"] < 5_000_000
    if ALL[name].method == "full":
        assert (summary["trainable_params"], summary["trainable_dtype"]) == (summary["total_params"], "bfloat16")
        assert (shell.folder / out / "model" / "model.safetensors").is_file()
    else:
        assert summary["trainable_dtype"] == "float32"
        require_adapter(shell.folder / out / "adapter", ALL[name])


def require_adapter(folder: Path, recipe: Recipe) -> None:
    """The saved adapter says and holds what the recipe asks for."""
    facts = json.loads((folder / "tuner.json").read_text())
    assert facts["precision"] == "bf16"
    assert facts["quantization"]["name"] == ("nf4" if recipe.method == "qlora" else "none")
    adapter = json.loads((folder / "adapter_config.json").read_text())
    layers = {STORED[name] for name in recipe.modules} | set(MLP) | ({"lm_head"} if recipe.output else set())
    if recipe.model == "phi3_mini":
        layers = {FUSED.get(name, name) for name in layers}
    else:
        assert (adapter["r"], adapter["lora_alpha"]) == (recipe.rank, recipe.alpha)
    assert set(adapter["target_modules"]) == layers
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
        assert {part for name in names for part in name.split(".") if part in layers} == layers
        assert all(tensors.get_tensor(name).isfinite().all() for name in names)
        assert any(tensors.get_tensor(name).any() for name in names if "lora_B" in name), "it has learned something"


def test_what_is_said_beside_it_wins(shell: Any) -> None:
    words = ["experiment=llama2/7B_lora_single_device", "peft=qlora", "peft.lora_rank=4", "model=llama2_13b"]
    cfg = tuner.compose([*words, "optimizer=sgd", "train.batch_size=1"])
    assert (cfg.peft.lora_rank, cfg.peft.lora_alpha, cfg.peft.name) == (4, 16, "qlora")
    assert cfg.quantization._target_ == "tuner.quantization.nf4.NF4"
    assert cfg.optimizer._target_ == "tuner.optimizers.sgd.sgd"
    assert (cfg.model.num_hidden_layers, cfg.train.batch_size) == (40, 1)


def test_a_sweep_goes_over_experiments(shell: Any) -> None:
    names = ["llama2/7B_qlora_single_device", "gemma/2B_lora_single_device", "phi3/mini_full_low_memory"]
    words = ["-m", f"experiment={','.join(names)}", "+scale=tiny", *SHORT, *shell.data, "hydra.sweep.dir=swept"]
    done = shell(*words)
    assert done.code == 0, done.err
    with (shell.folder / "swept" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["experiment"]: row["status"] for row in rows} == dict.fromkeys(names, "finished")


@pytest.mark.parametrize("dest", ["own/experiment/mine.yaml", "here/mine.yaml", "data/mine.yaml", "a b/it's.yaml"])
def test_a_copy_runs_by_the_command_that_cp_prints(dest: str, shell: Any) -> None:
    done = shell.inside("cp", "llama2/7B_lora_single_device", dest)
    assert done.code == 0, done.err
    copied, command = done.out.splitlines()
    assert copied == dest
    with (shell.folder / dest).open("a") as file:
        file.write("optimizer:\n  lr: 0.002\n")
    out = f"copies/{Path(dest).parts[0]}"
    ran = shell.line(" ".join([command, "+scale=tiny", *SHORT, *shell.data, f"'out={out}'"]))
    assert ran.code == 0, ran.err
    config = (shell.folder / out / "config.yaml").read_text()
    assert "lr: 0.002" in config
    assert "lora_alpha: 16" in config


def test_a_copy_under_experiment_is_chosen_by_its_name(shell: Any) -> None:
    assert shell.inside("cp", "llama2/7B_lora_single_device", "my_conf/experiment/mine.yaml").code == 0
    assert shell.inside("cp", "experiment/mistral/7B_full_low_memory", "my_conf/experiment/of/mine.yaml").code == 0
    for name, total in {"mine": LLAMA2_7B.total, "of/mine": MISTRAL.total}.items():
        done = shell.inside("validate", "--config-dir", "my_conf", f"experiment={name}")
        assert done.out.startswith(f"total_params: {total}\n"), done.err


@pytest.mark.parametrize("said", ["llama2/7B_lora_single_devise", "llama2/7B_lora", "lama2/7B_lora_single_device"])
def test_a_name_that_is_none_gets_the_nearest(said: str, shell: Any) -> None:
    done = shell.inside("validate", f"experiment={said}")
    assert done.code == 2
    start = f"error: experiment={said}: no such option; did you mean llama2/7B_lora_single_device"
    assert done.err.startswith(start)
    assert all(name in done.err for name in ALL)
    assert done.err.count("\n") == 1


def test_ls_says_each_in_a_line(shell: Any) -> None:
    everything, of_group = shell.inside("ls").out, shell.inside("ls", "experiment").out
    lines = dict(line.split("  ", 1) for line in of_group.splitlines())
    assert set(lines) == set(ALL)
    assert all(len(sentence.strip()) > 20 for sentence in lines.values())
    assert everything.endswith(of_group)
