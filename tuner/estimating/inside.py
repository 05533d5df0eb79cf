"""What kernels take of the allocator inside themselves, which no count of their results sees.

These are the only sizes of a step that are written down and not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tuner.precision.cpu_products import (
    ATTENTION_BACKWARD,
    PRODUCTS,
    attention_bytes,
    product_bytes,
    without_instructions,
)

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


def through_fp32() -> dict[Any, Callable[..., int]]:
    """What products in 16 bits take on this CPU, which has no instructions for them."""
    slow = without_instructions()

    def of_product(tensors: slice) -> Callable[..., int]:
        def taken(args: Any, kwargs: Any, out: Any) -> int:
            a, b = args[tensors][-2:]
            return product_bytes(a, b) if a.dtype in slow else 0

        return taken

    def of_attention(args: Any, kwargs: Any, out: Any) -> int:
        tensors: tuple[Tensor, ...] = args[:5]
        return attention_bytes(*tensors) if tensors[0].dtype in slow else 0

    products = {_operation(name): of_product(tensors) for name, (_, tensors) in PRODUCTS.items()}
    return {**products, _operation(ATTENTION_BACKWARD): of_attention}


def inside(device_type: str) -> Inside:
    """What the kernels of `cpu`, which is this machine's, or `cuda` take."""
    if device_type == "cuda":
        return {aten._scaled_dot_product_flash_attention_for_cpu_backward.default: flash_backward}
    return through_fp32() if without_instructions() else {}


def _operation(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(aten, base), overload or "default")
