"""What a step asks of numbers, answered for tensors that have none, so that no step takes more memory than the count.

A step looks at numbers in few places: which positions are trained, how many those are, whether a norm is finite. On
fake tensors every mask is true everywhere and every number is 1, so every position of a batch is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU = torch.device("cpu")

WITH_INDICES = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}


class WorstCase(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Entered above `FakeTensorMode` and `MemoryCount`, so that what is made for an answer is counted.

    Args:
        device_type: whose kernels the step has, `cpu` or `cuda`.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device_type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return CPU  # every second question of a step
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.nonzero.default:
            return everywhere(args[0])
        if func in WITH_INDICES and any(is_mask(index) for index in args[1]):
            places = [
                each for index in args[1] for each in (everywhere(index).unbind(1) if is_mask(index) else [index])
            ]
            args = (args[0], places, *args[2:])
        if self._device_type == "cpu" and func._schema.name.startswith("bitsandbytes::optimizer_update"):
            return on_cpu(func, args, kwargs)
        return func(*args, **kwargs)


def is_mask(index: Tensor | None) -> bool:
    """Whether an index says of each place if it is meant."""
    return index is not None and index.dtype is torch.bool


def everywhere(mask: Tensor) -> Tensor:
    """The places [n, dimensions] of all n elements of a mask."""
    return torch.empty(mask.numel(), mask.dim(), dtype=torch.int64, device=mask.device)


def on_cpu(func: Any, args: Any, kwargs: Any) -> Any:
    """bitsandbytes' CPU kernel of an optimizer: made of PyTorch's operations, with temporaries as large as a parameter.

    On a GPU it is one kernel without any, which is what bitsandbytes says of it for fake tensors.
    """
    kernel = torch.library.get_kernel(func, "CPU")
    return kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
