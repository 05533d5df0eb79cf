"""A torchtune YAML as flat keys; one of a recipe that has no counterpart is refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tuner.config.torchtune.commands import PREFERENCES, SEVERAL_DEVICES
from tuner.config.torchtune.keys import LEAVES
from tuner.errors import ConfigError

QAT = "there is no quantization-aware training; peft=qlora trains over 4-bit weights"
DISTILLATION = "there is no distillation"
OTHER_RECIPES = {
    "quantizer": QAT,
    "fake_quant_after_n_steps": QAT,
    "teacher_model": DISTILLATION,
    "teacher_checkpointer": DISTILLATION,
    "kd_loss": DISTILLATION,
    "kd_ratio": DISTILLATION,
    "policy_model": PREFERENCES,
    "reward_model": PREFERENCES,
    "reward_and_value_model": PREFERENCES,
    "value_model": PREFERENCES,
    "ref_policy_checkpointer": PREFERENCES,
    "reference_checkpointer": PREFERENCES,
    "ref_checkpointer": PREFERENCES,
    "ppo_epochs": PREFERENCES,
    "grpo_samples": PREFERENCES,
    "fsdp_cpu_offload": SEVERAL_DEVICES,
    "fsdp_reshard_after_forward": SEVERAL_DEVICES,
    "fsdp_sharding_strategy": SEVERAL_DEVICES,
    "memory_efficient_fsdp_wrap": SEVERAL_DEVICES,
    "custom_sharded_layers": SEVERAL_DEVICES,
    "tensor_parallel_dim": SEVERAL_DEVICES,
    "tensor_parallel_plan": SEVERAL_DEVICES,
    "context_parallel_dim": SEVERAL_DEVICES,
    "data_parallel_replicate_dim": SEVERAL_DEVICES,
    "data_parallel_shard_dim": SEVERAL_DEVICES,
    "tasks": "an evaluation; the verbs evaluate, generate and merge are for trained models",
    "max_new_tokens": "a generation; the verbs evaluate, generate and merge are for trained models",
}
"""Keys by which a recipe that is none of the LoRA, QLoRA and full single-device ones is known."""

OTHER_COMPONENTS = {
    "loss": (("DPOLoss", "RSOLoss", "IPOLoss", "SimPOLoss", "PPOLoss", "GRPOLoss"), PREFERENCES),
    "dataset": (("preference_dataset", "stack_exchange_paired_dataset", "hh_rlhf_helpful_dataset"), PREFERENCES),
    "checkpointer": (("DistributedCheckpointer",), SEVERAL_DEVICES),
}
"""The same by the last part of a `_component_`."""

NEEDED = ("model._component_", "optimizer._component_", "dataset._component_")


def read(file: Path) -> dict[str, Any]:
    """The keys of a torchtune YAML, dotted, with their values, interpolations resolved.

    Raises:
        ConfigError: no such file, no YAML, none of torchtune's, or of a recipe without a counterpart.
    """
    node = _node(file)
    tree = _container(node, resolve=False)
    if refusals := _refusals(tree):
        raise ConfigError(f"{file}: {refusal}" for refusal in refusals)
    if missing := [key for key in NEEDED if key not in dict(_flat(tree))]:
        raise ConfigError(
            f"{file}: no {', '.join(missing)}: no YAML of torchtune's recipes lora_finetune_single_device and "
            "full_finetune_single_device"
        )
    try:
        return dict(_flat(_container(node, resolve=True)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {error.full_key}: {str(error).splitlines()[0]}") from error


def _node(file: Path) -> DictConfig:
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; expected a YAML of torchtune's")
    try:
        node = OmegaConf.create(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {error.full_key}: {str(error).splitlines()[0]}") from error
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{file}: expected key: value lines, as torchtune's YAMLs hold")
    return node


def _container(node: DictConfig, *, resolve: bool) -> dict[str, Any]:
    tree = OmegaConf.to_container(node, resolve=resolve)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _flat(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, Mapping) or not node or path in LEAVES:
        return [(path, node)]
    return [row for key, child in node.items() for row in _flat(child, f"{path}.{key}" if path else str(key))]


def _refusals(tree: Mapping[str, Any]) -> list[str]:
    """Why this is no LoRA, QLoRA or full recipe for one device."""
    keys = [f"{key}: {reason}" for key, reason in OTHER_RECIPES.items() if tree.get(key) is not None]
    for group, (names, reason) in OTHER_COMPONENTS.items():
        component = str((tree.get(group) or {}).get("_component_")) if isinstance(tree.get(group), Mapping) else ""
        if component.rpartition(".")[2] in names:
            keys.append(f"{group}._component_={component}: {reason}")
    if isinstance(tree.get("dataset"), list):
        keys.append("dataset: several at once; join them into one file and name that")
    if tree.get("dtype") not in (None, "bf16", "fp32"):
        keys.append(f"dtype: {tree['dtype']}: precision is bf16 or fp32, or amp_fp16 over fp32 weights")
    return keys
