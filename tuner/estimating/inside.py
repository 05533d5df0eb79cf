"""What kernels take of the allocator inside themselves, which no count of their results sees.

These are the only sizes of a step that are written down and not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

aten = torch.ops.aten

Inside = Mapping[Any, Callable[..., int]]
"""By operation, bytes from (arguments, named arguments, output)."""


def flash_backward(args: Any, kwargs: Any, out: Any) -> int:
    """FlashAttention's backward pass on a GPU (arXiv:2307.08691): the gradient of the queries is summed in fp32, there
    is a number a query in fp32, and keys and values that several heads share get a gradient a head before they are
    summed."""
    q, k = args[1], args[2]
    B, H, T, E = q.shape
    per_head = 0 if k.shape[1] == H else 2 * B * H * k.shape[2] * E * q.element_size()
    return int(B * H * T * (E + 1) * 4 + per_head)


def inside(device_type: str) -> Inside:
    """What the kernels of `cpu` or `cuda` take."""
    if device_type == "cuda":
        return {aten._scaled_dot_product_flash_attention_for_cpu_backward.default: flash_backward}
    return {}
