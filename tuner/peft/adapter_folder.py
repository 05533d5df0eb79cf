"""Adapters on disk in the layout of Hugging Face PEFT: `adapter_model.safetensors` and `adapter_config.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.peft.lora import ADAPTER
from tuner.peft.lora_linear import Adapter, LoRALinear
from tuner.types import CausalLM

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
UNDERSTOOD = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_alpha", "lora_dropout"),
    *("bias", "use_rslora", "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config"),
}
"""Settings of PEFT which are applied here, or say nothing about what a saved adapter computes. Any other that is set is
refused: a setting that were ignored would give another model in silence."""

MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` under which PEFT changes the base weights too."""


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Checkpoint name and layer of every adapted linear."""
    for slot in cast(CausalLM, model).linears():
        if isinstance(slot.module, LoRALinear):
            yield slot.path, slot.module


def has_adapter(model: nn.Module) -> bool:
    return next(lora_layers(model), None) is not None


def save_adapter(model: nn.Module, folder: Path, *, base: str | None, extra: Mapping[str, Any]) -> None:
    """Write what Hugging Face PEFT loads with `PeftModel.from_pretrained(base_model, folder)`.

    Args:
        model: with LoRA layers.
        folder: made if it is not there.
        base: the folder of the base model.
        extra: facts for `tuner.json` beside it: what the base was quantized to while the adapter trained.

    Raises:
        ModelError: the model has no adapter.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ModelError("this model has no adapter to save")
    tensors = {}
    for path, layer in layers.items():
        adapter = cast(Adapter, layer.adapters[ADAPTER])
        tensors[f"{PREFIX}{path}.lora_A.weight"] = adapter.A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = adapter.B.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "target_modules": sorted({path.rpartition(".")[2] for path in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "tuner.json").write_text(json.dumps(dict(extra), indent=2) + "\n", encoding="utf-8")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`.

    Raises:
        ModelError: it is missing, not JSON, or describes something other than a plain LoRA.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"{folder}: no {CONFIG}, so this is no adapter folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error})") from error
    if (kind := config.get("peft_type")) != "LORA":
        raise ModelError(f"{path}: peft_type={kind} is not supported; valid: LORA")
    if used := [key for key, value in config.items() if value and key not in UNDERSTOOD]:
        raise ModelError(f"{path}: {', '.join(used)} cannot be loaded here")
    if str(init := config.get("init_lora_weights")).startswith(MOVES_THE_BASE):
        raise ModelError(f"{path}: init_lora_weights={init} changes the base weights too, which cannot be loaded here")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{path}: bias={config['bias']} is not supported; valid: none")
    return dict(config)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put an adapter, ours or one saved by PEFT, on the layers its tensors name.

    Raises:
        ModelError: a file is missing or damaged, or its tensors do not fit the model; all of them are named.
    """
    config = read_adapter_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS}: {error}") from error
    slots = {slot.path: slot for slot in cast(CausalLM, model).linears()}
    pairs: dict[str, dict[str, Any]] = {}
    bases: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        path, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if path in slots and part in ("lora_A", "lora_B"):
            pairs.setdefault(path, {})[part] = tensor
        elif path in slots and part == "base_layer" and isinstance(slots[path].module, nn.Linear):
            bases[path] = tensor  # PEFT saves an adapted head along with its adapter
        else:
            unknown.append(name)
    incomplete = [path for path, parts in pairs.items() if len(parts) < 2]
    if unknown or incomplete or not pairs:
        raise ModelError(f"{folder / WEIGHTS}: does not fit the model: {', '.join(unknown + incomplete) or 'empty'}")
    for path, parts in pairs.items():
        base = cast(nn.Linear, slots[path].module)
        shape = (int(base.out_features), int(base.in_features))
        rank, alpha = parts["lora_A"].shape[0], config["lora_alpha"]
        if parts["lora_B"].shape != (shape[0], rank) or parts["lora_A"].shape != (rank, shape[1]):
            raise ModelError(f"{folder / WEIGHTS}: {path} is made for another size than {list(shape)}")
        if path in bases and bases[path].shape != shape:
            raise ModelError(f"{folder / WEIGHTS}: {path}.base_layer is {list(bases[path].shape)}, not {list(shape)}")
        dropout, rslora = config.get("lora_dropout") or 0.0, bool(config.get("use_rslora"))
        adapter = Adapter(shape[1], shape[0], rank, alpha, dropout, rslora)
        if path in bases:
            base.weight.data.copy_(bases[path])
        adapter.A.data, adapter.B.data = parts["lora_A"], parts["lora_B"]
        device = next(base.parameters()).device
        slots[path].replace(LoRALinear(base, {ADAPTER: adapter}).to(device).train(model.training))
