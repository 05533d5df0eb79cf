"""`tuner merge`: an adapter into its base, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from tuner.errors import ConfigError
from tuner.models.llama import Llama
from tuner.peft.adapter_folder import has_adapter, lora_layers
from tuner.peft.merge import merge_adapters, merged_weight
from tuner.results import save_model
from tuner.verbs.source import Source, source_of


def merge(cfg: DictConfig, overrides: list[str]) -> str:
    """Write `dest` and say which base the adapter went into and what that choice costs.

    Raises:
        TunerError: no adapter, a `dest` that holds something, or no room.
    """
    dest = Path(cfg.dest).expanduser().absolute()
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ConfigError(f"dest={dest} exists and is not empty")
    source = source_of(cfg, overrides)
    model = source.load(quantized=cfg.merge_into == "dequantized")
    if not has_adapter(model):
        raise ConfigError("nothing to merge: give run=DIR, adapter=DIR or checkpoint=DIR of an adapter")
    report = _choice(source, model, cfg.merge_into)
    merge_adapters(model, source.dtype)
    save_model(model, source.tokenizer, dest)
    return f"{report}\nmerged: {dest}"


def _choice(source: Source, model: Llama, merge_into: str) -> str:
    """Which base it is and, over a quantized one, how far the two possible bases are apart."""
    dtype = str(source.dtype).removeprefix("torch.")
    if source.quantization.name == "none":
        return f"base: {source.model.path}, not quantized\nrounding to {dtype}: {_rounding(model, source.dtype):.2e}"
    other = source.load(quantized=merge_into != "dequantized")
    distance = _distance(model, other)
    name = source.quantization.name
    if merge_into == "dequantized":
        return (
            f"base: the {name} weights made dense again, which the adapter saw while it trained\n"
            f"rounding to {dtype}: {_rounding(model, source.dtype):.2e}; "
            f"distance from the weights before quantization: {distance:.2e} (both relative)"
        )
    return (
        f"base: the weights before quantization, which the adapter never saw\n"
        f"distance from the {name} weights it was trained on: {distance:.2e} (relative)"
    )


@torch.no_grad()
def _rounding(model: Llama, dtype: torch.dtype) -> float:
    """Relative Frobenius error of the merged weights in `dtype`."""
    exact = [merged_weight(layer) for _, layer in lora_layers(model)]
    return _relative(exact, [weight.to(dtype).float() for weight in exact])


@torch.no_grad()
def _distance(model: Llama, other: Llama) -> float:
    """Relative Frobenius distance between the merged weights on two bases."""
    pairs = zip(lora_layers(model), lora_layers(other), strict=True)
    weights = [(merged_weight(mine), merged_weight(theirs)) for (_, mine), (_, theirs) in pairs]
    return _relative([a for a, _ in weights], [b for _, b in weights])


def _relative(weights: list[Tensor], others: list[Tensor]) -> float:
    difference = sum(float((a - b).square().sum()) for a, b in zip(weights, others, strict=True))
    return float((difference / sum(float(a.square().sum()) for a in weights)) ** 0.5)
