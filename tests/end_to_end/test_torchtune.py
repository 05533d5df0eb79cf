"""A person who comes from torchtune: words are answered, and a YAML becomes a run by the commands that are printed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

TINY = ["model=tiny", "peft=full", "train.max_steps=1", "train.num_samples=0", "logger=none", "out=base"]


def test_the_shell_gets_our_words(shell: Any) -> None:
    done = shell("run", "lora_finetune_single_device", "--config", "llama2/7B_lora_single_device", "batch_size=4")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: run llama2/7B_lora_single_device: torchtune's command; say python -m tuner ")
    assert "train.batch_size=4" in done.err
    done = shell("dtype=bf16", "optimizer._component_=torch.optim.AdamW")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == [
        "error: dtype=bf16: torchtune's name; say precision=bf16",
        "error: optimizer._component_=torch.optim.AdamW: torchtune's name; say optimizer=adamw",
    ]


def yaml_of(shell: Any, model: str, keys: dict[str, Any], more: dict[str, Any]) -> str:
    """A YAML over the tiny model's folder and the test's data, as a file beside them."""
    tree = {
        "output_dir": f"runs/{model}",
        "model": {"_component_": f"torchtune.models.llama2.{model}", **keys},
        "tokenizer": {
            "_component_": "torchtune.models.llama2.llama2_tokenizer",
            "path": "base/model/tokenizer.json",
            "max_seq_len": 128,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": "base/model",
            "checkpoint_files": ["model.safetensors"],
            "output_dir": "${output_dir}",
        },
        "dataset": {"_component_": "torchtune.datasets.alpaca_dataset", "source": "json", "data_files": "sums.jsonl"},
        "seed": 3,
        "batch_size": 4,
        "epochs": 1,
        "max_steps_per_epoch": 3,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "loss": {"_component_": "torchtune.modules.loss.LinearCrossEntropyLoss"},
        "device": "cpu",
        "dtype": "fp32",
        "enable_activation_checkpointing": True,
        "log_level": "INFO",
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": "${output_dir}"},
        "profiler": {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False},
        **more,
    }
    file = shell.folder / f"{model}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file.name


LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "keys", "more", "left"),
    [
        ("lora_llama2_7b", LORA, {"gradient_accumulation_steps": 2}, "adapter/adapter_model.safetensors"),
        ("qlora_llama2_7b", LORA, {"gradient_accumulation_steps": 2}, "adapter/adapter_model.safetensors"),
        ("llama2_7b", {}, {"optimizer_in_bwd": True}, "model/config.json"),
    ],
)
def test_a_yaml_runs_by_the_command_that_is_printed(
    shell: Any, model: str, keys: dict[str, Any], more: dict[str, Any], left: str
) -> None:
    if not (shell.folder / "base").exists():
        assert shell.inside(*TINY, *shell.data).code == 0
    file = yaml_of(shell, model, keys, more)
    done = shell.inside("cp", "--from-torchtune", file, f"mine/experiment/{model}.yaml")
    assert (done.code, done.err) == (0, "")
    assert "  log_level: INFO -- no levels: what is printed is also in run.log" in done.out
    validate, run = (line.partition(":")[2].strip() for line in done.out.splitlines()[1:3])
    checked = shell.line(validate)
    assert (checked.code, checked.err) == (0, "")
    assert checked.out.startswith("total_params: ")
    ran = shell.line(run)
    assert (ran.code, ran.err) == (0, "")
    out = shell.folder / "runs" / model
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    assert f"trainable_params: {summary['trainable_params']}\n" in checked.out
    assert (out / left).is_file()
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["train"]["batch_size"], config["seed"]) == (4, 3)
    assert config["train"]["gradient_accumulation_steps"] == more.get("gradient_accumulation_steps", 1)
    assert config["memory"]["optimizer_in_bwd"] is more.get("optimizer_in_bwd", False)
    assert config["memory"]["activation_checkpointing"] == "full"
    assert config["data"]["max_seq_len"] == 128
