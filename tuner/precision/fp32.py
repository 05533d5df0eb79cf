"""Everything in 32-bit floats."""

from __future__ import annotations

from typing import Literal

from tuner.types import Precision


def fp32(trainable: Literal["auto", "bf16", "fp32"]) -> Precision:
    """Weights and activations in float32."""
    return Precision(name="fp32", compute="float32", trainable=trainable)
