"""Full fine-tuning: every parameter trains."""

from __future__ import annotations

from typing import Literal

from torch import nn


class Full:
    """Train all weights.

    Args:
        name: `full`.
    """

    def __init__(self, name: Literal["full"]) -> None:
        self.name = name

    def adapt(self, model: nn.Module) -> None:
        """Every parameter of `model` gets `requires_grad`."""
        model.requires_grad_(True)
