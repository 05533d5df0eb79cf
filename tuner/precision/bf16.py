"""Everything in bfloat16: weights, activations, gradients and, in full training, optimizer state; no autocast."""

from __future__ import annotations

from typing import Literal

from tuner.types import Precision


def bf16(trainable: Literal["auto", "bf16", "fp32"]) -> Precision:
    """Weights and activations in bfloat16; what trains, as `trainable` says."""
    return Precision(name="bf16", compute="bfloat16", trainable=trainable)
