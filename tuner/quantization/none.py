"""No quantization: linear layers keep their weights as they were loaded."""

from __future__ import annotations

from torch import nn


class NoQuantization:
    """Leaves the model as it is."""

    name = "none"

    def packed(self, linear: nn.Linear) -> nn.Module:
        """The layer itself."""
        return linear

    def quantize(self, model: nn.Module) -> None:
        """Nothing to do."""
