"""What a precision becomes on the device at hand."""

from __future__ import annotations

import torch

from tuner.types import Precision


def resolve(precision: Precision, device: torch.device) -> tuple[Precision, str | None]:
    """The precision that will really run and, where that is another one than asked for, a line that says so.

    Every CPU computes bfloat16. A GPU counts only if it does so in hardware (compute capability 8.0): PyTorch also
    emulates it on older ones, slower than float32.
    """
    if precision.compute != "bfloat16" or device.type != "cuda" or _has_bf16(device):
        return precision, None
    trainable = "fp32" if precision.trainable == "bf16" else precision.trainable
    name = torch.cuda.get_device_name(device)
    return Precision("fp32", "float32", trainable), f"precision: {name} has no bfloat16, so this run uses fp32"


def _has_bf16(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
