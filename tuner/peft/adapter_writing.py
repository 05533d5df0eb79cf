"""Writes an adapter as Hugging Face PEFT does, such that `PeftModel.from_pretrained(base, folder)` gives this model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors.torch import save_file
from torch import nn

from tuner.adapter_config import CONFIG, IA3, LN_TUNING, LORA
from tuner.errors import ModelError
from tuner.peft.adapted import adapted_layers
from tuner.peft.adapter_folder import has_adapter
from tuner.peft.dora import DoRAAdapter
from tuner.peft.fusion import StoredLayer, fused, fused_vectors, stored_layers
from tuner.peft.ia3 import IA3Linear
from tuner.peft.layernorm import norms, tuned_biases, tuned_norms
from tuner.peft.lora import ADAPTER
from tuner.peft.lora_linear import Adapter, LoRALinear
from tuner.peft.residual import ResidualAdapter
from tuner.peft.residual_folder import FACTS, OVER_RESIDUAL
from tuner.peft.saved_modules import parameters, saved_modules
from tuner.peft.stored import WEIGHTS, Contents, Pair, to_stored
from tuner.peft.token_rows import row_layers

Value = TypeVar("Value", int, float)


def save_adapter(
    model: nn.Module, folder: Path, *, base: str | None, extra: Mapping[str, Any], revision: str | None = None
) -> None:
    """Write weights and settings: ranks and scales as they are on the layers, modules and rows as they were brought.

    Args:
        model: with an adapter of one kind.
        folder: made if it is not there.
        base: the folder of the base model, or its name on the Hugging Face Hub.
        revision: the commit of that name.
        extra: facts for `tuner.json` beside it: what the base was quantized to while the adapter trained.

    Raises:
        ModelError: the model has no adapter.
    """
    if not has_adapter(model):
        raise ModelError("this model has no adapter to save")
    saved = saved_modules(model)
    contents = _contents(model, stored_layers(model, without=saved.paths))
    tokens = {_last(path): layer.ids.tolist() for path, layer in row_layers(model)}
    config = {
        **_settings(model, contents),
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base,
        "revision": revision,
        "modules_to_save": list(saved.names) or None,
        **({"ensure_weight_tying": True} if saved.tied else {}),
        **({"trainable_token_indices": tokens} if tokens else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_stored(contents), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    facts = {**extra, **_over_residual(model)}
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _adapter(layer: LoRALinear) -> Adapter:
    return cast(Adapter, layer.adapters[ADAPTER])


def _contents(model: nn.Module, stored: Mapping[str, StoredLayer]) -> Contents:
    """What the model has, by the names of the checkpoint's layers."""
    rows = ((path, layer.rows) for path, layer in row_layers(model))
    contents = Contents(parameters=dict(parameters(model)), rows=dict(rows))
    layers = dict(adapted_layers(model))
    lora = {path: layer for path, layer in layers.items() if isinstance(layer, LoRALinear)}
    if lora:
        contents.pairs = fused(_pairs(model, lora), stored, _adapter(next(iter(lora.values()))).use_rslora)
    scaled = {path: layer.scaling_as_stored() for path, layer in layers.items() if isinstance(layer, IA3Linear)}
    contents.vectors = fused_vectors(scaled, stored)
    contents.tuned = {f"{path}.weight": weight for path, weight in tuned_norms(model)}
    contents.tuned |= {f"{path}.bias": bias for path, bias in tuned_biases(model)}
    return contents


def _pairs(model: nn.Module, layers: Mapping[str, LoRALinear]) -> dict[str, Pair]:
    moved, pairs = saved_modules(model).bases, {}
    for path, layer in layers.items():
        adapter, base = _adapter(layer), cast(nn.Linear, layer.base)
        kept = base.weight if path in moved else None
        if isinstance(adapter, ResidualAdapter):
            pairs[path] = adapter.difference()
            continue
        magnitude = adapter.magnitude if isinstance(adapter, DoRAAdapter) else None
        pairs[path] = Pair(adapter.rank, adapter.alpha, adapter.A, adapter.B, kept, magnitude)
    return pairs


def _over_residual(model: nn.Module) -> dict[str, float]:
    """The alpha that its adapters trained with, where they began with a part of the weights."""
    alpha = next((module.alpha for module in model.modules() if isinstance(module, ResidualAdapter)), None)
    return {} if alpha is None else {OVER_RESIDUAL: alpha}


def _settings(model: nn.Module, contents: Contents) -> dict[str, Any]:
    """The settings of the kind of adapter that this is."""
    everything = [*stored_layers(model, without=saved_modules(model).paths), *(path for path, _ in norms(model))]
    if contents.pairs:
        lora = next(layer for _, layer in adapted_layers(model) if isinstance(layer, LoRALinear))
        return {**_of_lora(contents, _adapter(lora)), "target_modules": _targets(contents.pairs, everything)}
    if contents.vectors:
        on_input = [path for path, vector in contents.vectors.items() if vector.shape[0] == 1]
        names = {path: name for name in _targets(contents.vectors, everything) for path in on_input if _is(name, path)}
        return {
            "peft_type": IA3,
            "target_modules": _targets(contents.vectors, everything),
            "feedforward_modules": sorted(set(names.values())),
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }
    tuned = {name.rpartition(".")[0] for name in contents.tuned}
    return {"peft_type": LN_TUNING, "target_modules": _targets(tuned, everything)}


def _of_lora(contents: Contents, adapter: Adapter) -> dict[str, Any]:
    """The settings that say what the layers compute; dropout and the kind of scale are those of all of them."""
    rank, rank_pattern = _pattern({path: pair.rank for path, pair in contents.pairs.items()})
    alpha, alpha_pattern = _pattern({path: pair.alpha for path, pair in contents.pairs.items()})
    return {
        "peft_type": LORA,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "use_dora": isinstance(adapter, DoRAAdapter),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _pattern(values: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
    """The commonest value and the others by name: of all layers called the same, or of one by its whole name."""
    common = Counter(values.values()).most_common(1)[0][0]
    kinds: dict[str, set[Value]] = {}
    for path, value in values.items():
        kinds.setdefault(_last(path), set()).add(value)
    named = {(_last(path) if len(kinds[_last(path)]) == 1 else path): value for path, value in values.items()}
    return common, {name: value for name, value in named.items() if value != common}


def _targets(paths: Collection[str], everything: Collection[str]) -> list[str]:
    """Names that PEFT finds these layers by: of their kind where all of a kind are among them, else whole."""
    partly = {_last(path) for path in everything if path not in paths}
    return sorted({path if _last(path) in partly else _last(path) for path in paths})


def _is(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _last(path: str) -> str:
    return path.rpartition(".")[2]
