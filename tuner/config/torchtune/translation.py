"""From the keys of a torchtune YAML to the settings of a run here, every key accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tuner.config.torchtune.keys import COMPONENTS, answer
from tuner.config.torchtune.preset import Preset, Setting, plain
from tuner.config.torchtune.settling import settle_data, settle_model, settle_optimizer, settle_peft, settle_schedule

ARGUMENT = re.compile(r"optimizer\.[A-Za-z]\w*")
"""An optimizer's arguments have the same names here."""


def translation_of(keys: Mapping[str, Any]) -> Preset:
    """The settings that mean what `keys` mean in torchtune.

    Args:
        keys: dotted, of `reading.read`.

    Raises:
        ConfigError: a model that is not here.
    """
    preset = Preset()
    for key, value in _without_profiler(preset, keys):
        _take(preset, key, value)
    _settle_length(preset, keys)
    settle_model(preset, keys)
    settle_peft(preset, keys)
    settle_data(preset, keys)
    settle_optimizer(preset)
    settle_schedule(preset, keys)
    _settle_outside(preset, keys)
    return preset


def _without_profiler(preset: Preset, keys: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The keys but for the profiler's many, which are one thing that is on or off."""
    if any(key.startswith("profiler.") for key in keys):
        is_on = keys.get("profiler.enabled") is not False
        found = answer("profiler.enabled", is_on)
        assert found is not None
        (preset.listed if is_on else preset.held).append(f"profiler: {'on' if is_on else 'off'} -- {found.note}")
    return [(key, value) for key, value in keys.items() if not key.startswith("profiler.")]


def _take(preset: Preset, key: str, value: Any) -> None:
    origin = f"{key}: {plain(value)}"
    if not value and key in COMPONENTS:
        preset.held.append(f"{origin} -- none there")
        return
    found = answer(key, value)
    if found is None and ARGUMENT.fullmatch(key):
        preset.put(key, value, origin)
        return
    if found is None:
        preset.listed.append(f"{origin} -- not understood: no key of torchtune's that is known here")
        return
    for ours, said in found.words:
        preset.put(ours, said, origin)
    if found.lost:
        preset.listed.append(f"{origin} -- {found.note}")
    elif found.note:
        preset.held.append(f"{origin} -- {found.note}")


def _settle_length(preset: Preset, keys: Mapping[str, Any]) -> None:
    """Steps of the whole run, where torchtune limits those of an epoch."""
    per_epoch, epochs = keys.get("max_steps_per_epoch"), keys.get("epochs")
    if isinstance(per_epoch, int) and isinstance(epochs, int):
        origin = f"epochs: {epochs} x max_steps_per_epoch: {per_epoch}"
        preset.settings["train.max_steps"] = Setting(per_epoch * epochs, origin)
        preset.settings["train.epochs"] = Setting(None, origin)
        preset.listed.append(
            f"{origin} -- steps of the whole run here, the data going on; where an epoch has fewer, there are more"
        )
    elif "train.max_steps" not in preset.settings:
        preset.listed.append("epochs -- not said: the length is train.max_steps=60, the default here")


def _settle_outside(preset: Preset, keys: Mapping[str, Any]) -> None:
    """What torchtune means where nothing is said, and what two of its keys say differently."""
    preset.default("train.clip_grad_norm", None, "torchtune's default")
    preset.default("train.val_every_steps", None, "torchtune has no validation in between")
    out, elsewhere = keys.get("output_dir"), keys.get("checkpointer.output_dir")
    if out is not None and elsewhere not in (None, out):
        preset.settings["out"] = Setting(out, f"output_dir: {out}")
        preset.listed.append(f"checkpointer.output_dir: {elsewhere} -- the one run folder is out={out}")
