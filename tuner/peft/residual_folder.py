"""A saved adapter that began with a part of the weights: its base is made the residual again before it is quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
from torch import nn

from tuner.adapter_config import AdapterConfig, read_adapter_config
from tuner.errors import ModelError
from tuner.peft.fusion import split, stored_layers
from tuner.peft.residual import ResidualAdapter, subtract
from tuner.peft.stored import Pair, from_stored, tensors_of
from tuner.types import FrozenLinear, LinearSlot

FACTS, OVER_RESIDUAL = "tuner.json", "over_residual"
"""The file beside an adapter's settings, and where it says with which alpha one trained that began with a part of the
weights. Hugging Face PEFT reads the difference to the original base, which the adapter is too."""

NOTE = "residual_layers"
"""The attribute of a model that holds the names of layers whose weights are residuals."""


class Residuals:
    """Leaves the layers of a base without what a saved adapter began with.

    Args:
        folder: of the adapter, ours or anyone's; of one of another kind, nothing is done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pairs: dict[str, Pair] | None = None

    def before_packing(self, model: nn.Module, slot: LinearSlot) -> None:
        """Change a layer if it is one that the adapter adapts.

        Raises:
            ModelError: a file of the adapter is missing or damaged.
        """
        if (alpha := alpha_over_residual(self.folder)) is None:
            return
        config = read_adapter_config(self.folder)
        if self._pairs is None:
            contents = from_stored(tensors_of(self.folder), config)
            layers = stored_layers(model)
            known = {path: pair for path, pair in contents.pairs.items() if path in layers and pair.A is not None}
            self._pairs = split(known, layers, config.use_rslora)
        if (pair := self._pairs.get(slot.path)) is not None:
            residual_adapter(model, slot, pair, config, alpha)


def residual_adapter(
    model: nn.Module, slot: LinearSlot, pair: Pair, config: AdapterConfig, alpha: float
) -> ResidualAdapter | None:
    """The adapter that went on from the residual of a layer, which this is made if it is not that yet.

    None for a layer that is quantized already: there is nothing left to take anything from.

    Raises:
        ModelError: a rank that is no double.
    """
    if pair.rank % 2:
        raise ModelError(f"{slot.path}: {FACTS} says {OVER_RESIDUAL}, and rank {pair.rank} is no double of one")
    adapter: ResidualAdapter = ResidualAdapter.of_difference(pair, alpha, config.dropout, config.use_rslora)
    done: set[str] = getattr(model, NOTE, set())
    if next(slot.module.parameters()).is_meta or slot.path in done:
        return adapter
    if isinstance(slot.module, FrozenLinear):
        return None
    with torch.no_grad():
        subtract(cast(nn.Linear, slot.module), (adapter.first_A, adapter.first_B), adapter.scale)
    setattr(model, NOTE, done | {slot.path})
    return adapter


def alpha_over_residual(folder: Path) -> float | None:
    """The alpha of an adapter of ours that began with a part of the weights; None for any other.

    Raises:
        ModelError: the file that says it is damaged.
    """
    if not (file := folder / FACTS).is_file():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not JSON ({error})") from error
    alpha = facts.get(OVER_RESIDUAL) if isinstance(facts, dict) else None
    if alpha is not None and not (isinstance(alpha, int | float) and alpha > 0):
        raise ModelError(f"{file}: {OVER_RESIDUAL}={alpha}: expected a number > 0")
    return alpha
