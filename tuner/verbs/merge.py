"""`tuner merge`: an adapter into its base, as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from tuner.errors import ConfigError
from tuner.models.decoder import Decoder
from tuner.peft.adapted import adapted_layers, dense_weight
from tuner.peft.adapter_folder import has_adapter
from tuner.results import require_free, save_model
from tuner.verbs.source import Source, source_of


def merge(cfg: DictConfig, overrides: list[str]) -> str:
    """Write `dest` and say which base the adapter went into and what that choice costs.

    Raises:
        TunerError: no adapter, a `dest` that holds something, or no room.
    """
    dest = Path(cfg.dest).expanduser().absolute()
    require_free(dest)
    source = source_of(cfg, overrides)
    model = source.load(quantized=cfg.merge_into == "dequantized")
    if not has_adapter(model):
        raise ConfigError(
            "nothing to merge: give run=DIR, adapter=DIR or checkpoint=DIR of an adapter; full training leaves a whole "
            "model, which tuner export writes from a checkpoint"
        )
    return write_merged(source, model, cfg.merge_into, dest)


def write_merged(source: Source, model: Decoder, merge_into: str, dest: Path) -> str:
    """Write the merged model and say which base the adapter went into.

    Args:
        source: of the model.
        model: with its adapter, on the base that `merge_into` names.
        merge_into: `dequantized` or `original`.
        dest: appears whole or not at all.

    Raises:
        CheckpointError: no room on the disk.
    """
    report = _choice(source, model, merge_into)
    save_model(model, source.tokenizer, dest)
    return f"{report}\nmerged: {dest}"


def _choice(source: Source, model: Decoder, merge_into: str) -> str:
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
def _rounding(model: Decoder, dtype: torch.dtype) -> float:
    """Relative Frobenius error of the merged weights in `dtype`."""
    return _relative((weight, weight.to(dtype).float()) for weight in _merged(model))


@torch.no_grad()
def _distance(model: Decoder, other: Decoder) -> float:
    """Relative Frobenius distance between the merged weights on two bases."""
    return _relative(zip(_merged(model), _merged(other), strict=True))


def _merged(model: Decoder) -> Iterator[Tensor]:
    """The matrices in fp32 that an adapter is merged into, or, of one of norms, those of the blocks; one at a time."""
    adapted = [layer for _, layer in adapted_layers(model)]
    yield from (layer.merged_weight() for layer in adapted)
    if not adapted:
        yield from (dense_weight(slot.module).float() for slot in model.quantizable())


def _relative(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Of weights and others, two at a time in memory."""
    difference = size = 0.0
    for weight, other in pairs:
        difference += float((weight - other).square().sum())
        size += float(weight.square().sum())
    return float((difference / size) ** 0.5)
