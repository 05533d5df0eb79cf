"""What a precision becomes on the device at hand."""

from __future__ import annotations

import torch

from tuner.errors import ConfigError
from tuner.types import Precision

FIRST_WITH_FP16 = (5, 3)
"""Compute capability from which on NVIDIA's GPUs compute float16."""


def resolve(precision: Precision, device: torch.device) -> tuple[Precision, str | None]:
    """The precision that will really run and, where that is another one than asked for, a line that says so.

    Every CPU computes bfloat16 and, since PyTorch's own `torch.amp` does so there, float16, if not fast. A GPU counts
    for bfloat16 only if it does it in hardware (compute capability 8.0): PyTorch also emulates it on older ones, slower
    than float32.

    Raises:
        ConfigError: float16 was asked for, and the GPU has none.
    """
    if device.type != "cuda" or precision.compute == "float32":
        return precision, None
    if precision.compute == "float16":
        _require_fp16(precision.name, device)
        return precision, None
    if _has_bf16(device):
        return precision, None
    name = torch.cuda.get_device_name(device)
    line = f"precision: {name} has no bfloat16, so this run uses fp32"
    half = "; precision=amp_fp16 computes in 16 bits on it" if precision.name == "amp_bf16" else ""
    return in_fp32(precision), line + half


def in_fp32(precision: Precision) -> Precision:
    """What a precision becomes where there is no bfloat16."""
    return Precision("fp32", "float32", "fp32" if precision.trainable == "bf16" else precision.trainable)


def _require_fp16(precision: str, device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FIRST_WITH_FP16:
        raise ConfigError(
            f"precision={precision}: {torch.cuda.get_device_name(device)} has no float16 (compute capability "
            f"{major}.{minor}, and float16 begins at {FIRST_WITH_FP16[0]}.{FIRST_WITH_FP16[1]}); say precision=fp32"
        )


def _has_bf16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
