"""An adapter that is there already, trained further: what it adapts, its ranks and scales are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from tuner.errors import ModelError
from tuner.peft.adapter_folder import adapter_parameters, load_adapter
from tuner.peft.residual_folder import Residuals
from tuner.types import LinearSlot


class FromAdapter:
    """Freeze the model, put an adapter on it and train that; modules that it brings whole train too, as in PEFT.

    Args:
        name: `adapter`.
        path: its folder, ours or one saved by Hugging Face PEFT.

    Raises:
        ModelError: no path.
    """

    def __init__(self, name: Literal["adapter"], path: str | None) -> None:
        if path is None:
            raise ModelError("peft=adapter: no adapter is named; say adapter=FOLDER")
        self.name = name
        self.path = Path(path)
        self._residuals = Residuals(self.path)

    def before_packing(self, model: nn.Module, slot: LinearSlot) -> None:
        """Leave a layer without what the adapter began with, if it is of such a kind.

        Raises:
            ModelError: it is damaged.
        """
        self._residuals.before_packing(model, slot)

    def adapt(self, model: nn.Module) -> None:
        """Load in place; afterwards exactly what the adapter brought has `requires_grad`.

        Raises:
            ModelError: it is damaged, of another method or does not fit the model.
        """
        model.requires_grad_(False)
        load_adapter(model, self.path)
        for parameter in adapter_parameters(model):
            parameter.requires_grad_(True)
