"""What several keys say together: folders, torchtune's own defaults, lengths that depend on each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tuner.config.facts import shape_of_folder
from tuner.config.folder import conf_dir
from tuner.config.torchtune.components import FAMILIES
from tuner.config.torchtune.keys import CONTEXT
from tuner.config.torchtune.preset import Preset, Setting
from tuner.config.torchtune.words import rendered
from tuner.errors import ConfigError


def settle_model(preset: Preset, keys: Mapping[str, Any]) -> None:
    """A model's folder as far as it is here; a model without a config here needs one."""
    name, path = preset.value("model"), preset.value("model.path")
    origin = f"checkpointer.checkpoint_dir: {path}"
    folder = Path(str(path)).expanduser() if path is not None else None
    is_here = folder is not None and (folder / "config.json").is_file()
    if name is None or (name in FAMILIES.values() and not is_here):
        component = f"model._component_: {keys['model._component_']}"
        raise ConfigError(next(line for line in preset.listed if line.startswith(component)))
    if path is None:
        preset.listed.append("checkpointer.checkpoint_dir -- not said: the weights' folder is model.path=FOLDER")
        preset.needed.append("model.path=FOLDER")
    elif not is_here:
        del preset.settings["model.path"]
        preset.needed.append(rendered("model.path", path))
        meta = folder is not None and (folder / "params.json").is_file()
        convert = f"Meta's files: python -m tuner convert source={path} dest=NEW, and model.path=NEW"
        preset.listed.append(f"{origin} -- {convert if meta else 'no folder with a config.json here; as it comes'}")
    _settle_tokenizer(preset, keys, folder)


def _settle_tokenizer(preset: Preset, keys: Mapping[str, Any], folder: Path | None) -> None:
    for key in ("tokenizer.path", "tokenizer.merges_file"):
        file = keys.get(key)
        if file and folder and not Path(str(file)).expanduser().is_relative_to(folder):
            preset.held = [line for line in preset.held if not line.startswith(f"{key}:")]
            preset.listed.append(f"{key}: {file} -- the tokenizer is that of the model's folder, {folder}: copy it")


def settle_peft(preset: Preset, keys: Mapping[str, Any]) -> None:
    """What torchtune's builders and recipes take where nothing is said, which is not what is the default here."""
    preset.default("checkpoint.save_merged", True, "torchtune's default: whole weights for each epoch")
    _settle_dora(preset, keys)
    if preset.value("peft") == "full":
        _keep_those_of(preset, "peft", "full")
        return
    origin = "torchtune's default"
    for key, value in {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0}.items():
        preset.default(f"peft.{key}", value, origin)
    preset.default("peft.apply_lora_to_mlp", False, origin)
    preset.default("peft.apply_lora_to_output", False, origin)


def _settle_dora(preset: Preset, keys: Mapping[str, Any]) -> None:
    """DoRA is a method beside qlora here, so the 4 bits of a builder that quantizes are said for themselves."""
    if keys.get("model.use_dora") is not True or preset.value("peft") == "full":
        return
    origin = preset.settings["peft"].origin
    builder = str(keys["model._component_"]).rpartition(".")[2]
    if keys.get("model.quantize_base") is True or builder.startswith("qlora_"):
        preset.settings["quantization"] = Setting("nf4", origin)
    preset.settings["peft"] = Setting("dora", origin)
    preset.held = [line for line in preset.held if not line.startswith("model.use_dora:")]


def settle_data(preset: Preset, keys: Mapping[str, Any]) -> None:
    """One local file; a dataset of the hub gets the name that its file is looked for under."""
    source = keys.get("dataset.source")
    if "data.path" not in preset.settings:
        hub = {"alpaca_dataset": "tatsu-lab/alpaca", "alpaca_cleaned_dataset": "yahma/alpaca-cleaned"}
        name = str(source or hub.get(str(keys["dataset._component_"]).rpartition(".")[2]) or "dataset")
        file = re.sub(r"[^\w.-]+", "-", name.strip("/").rpartition("/")[2]) + ".jsonl"
        preset.default("data.path", file, f"dataset: {name}")
        preset.listed.append(f"dataset: {name} -- no local file: bring it as {file}, or say data.path=FILE")
    _settle_context(preset)
    if preset.value("data") == "alpaca" and keys.get("dataset.train_on_input") is None:
        preset.listed.append("dataset.train_on_input -- not said, and true there: here only replies are trained on")
    preset.held.append("data.val_fraction -- a share of the data is set aside for validation, which torchtune does not")


def _settle_context(preset: Preset) -> None:
    """No limit in torchtune is the model's context here: that of its folder, where it is here."""
    origin = "no limit there: the model's context"
    preset.default("data.max_seq_len", CONTEXT, origin)
    path = preset.value("model.path")
    if preset.value("data.max_seq_len") == CONTEXT and path is not None:
        context = shape_of_folder(str(path)).get("max_position_embeddings", CONTEXT)
        preset.settings["data.max_seq_len"] = Setting(context, origin)


UNSAID: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.0},
    "adafactor": {"lr": 1.0e-2},
    "muon": {"adjust_lr_fn": "original"},
    "lion8bit": {"lr": 1.0e-4},
    "paged_lion8bit": {"lr": 1.0e-4},
}
"""Defaults of the classes themselves that are others here."""


def settle_optimizer(preset: Preset) -> None:
    """Keys that the optimizer has; torch's own defaults where nothing is said."""
    name = preset.value("optimizer")
    for key, value in UNSAID.get(str(name), {}).items():
        preset.default(f"optimizer.{key}", value, "its default there")
    preset.default("optimizer.lr", 1.0e-3, "torch's default")
    _keep_those_of(preset, "optimizer", name if name != "custom" else None)
    if trusted := preset.settings.pop("trust_targets", None):
        preset.trusted.append(rendered("trust_targets", trusted.value))
        preset.listed.append(f"{trusted.origin} -- code of another package: the command says {preset.trusted[-1]}")
    _keep_those_of(preset, "logger", preset.value("logger"))


def _keep_those_of(preset: Preset, group: str, option: str | None) -> None:
    """List the settings of a group's member that this option does not have; of none, all are its own."""
    if option is None:
        return
    valid = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8"))
    for key in [key for key in preset.settings if key.startswith(f"{group}.")]:
        if key.partition(".")[2] not in valid:
            preset.listed.append(f"{preset.settings.pop(key).origin} -- {group}={option} has no such key")


def settle_schedule(preset: Preset, keys: Mapping[str, Any]) -> None:
    preset.default("schedule", "constant", "no lr_scheduler")
    warmup, steps = preset.value("schedule.warmup_steps"), preset.value("train.max_steps")
    if isinstance(warmup, int) and isinstance(steps, int) and warmup > steps:
        origin = f"lr_scheduler.num_warmup_steps: {warmup}"
        preset.settings["schedule.warmup_steps"] = Setting(steps, origin)
        preset.listed.append(f"{origin} -- longer than the run of {steps} steps, all of which warm up")
