"""Mixed precision with bfloat16: weights in fp32, matrix products in bfloat16."""

from __future__ import annotations

from typing import Literal

from tuner.types import Precision


def amp_bf16(trainable: Literal["auto", "fp32"]) -> Precision:
    """Weights, residual stream and norms in float32; what goes into a matrix product, and comes out, in bfloat16."""
    return Precision(name="amp_bf16", compute="bfloat16", trainable=trainable, weights="float32")
