"""Products in 16 bits on a CPU that has no instructions for them.

PyTorch multiplies bfloat16 and float16 matrices through oneDNN where the CPU has AVX-512 or better. Elsewhere it has
loops of its own, up to 97 times as slow as its fp32 product (benchmarks/cpu_products.md). Here the operands are cast to
fp32 a piece at a time and multiplied, and the sum is rounded once, as by instructions in 16 bits, which sum in fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

PIECE = 2**20
"""Numbers of a piece, 4 MiB in fp32: what is cast is still near the processor when it is multiplied."""

FEW_ROWS = 2
"""Up to so many rows PyTorch's own loop over a transposed matrix, which reads it once, is the faster one."""

CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

_registered: list[torch.library.Library] = []


def without_instructions() -> frozenset[torch.dtype]:
    """The formats in 16 bits that oneDNN does not multiply in on this CPU."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, is_fast in supported.items() if not is_fast)


def multiply_through_fp32() -> None:
    """From here on this process multiplies so in the formats of `without_instructions`; a second call does nothing.

    PyTorch's kernels of CPU tensors are replaced, since autograd, attention, optimizers and other libraries call them
    too. Tensors of other formats get PyTorch's as before, some microseconds later.
    """
    if _registered or not without_instructions():
        return
    # It lives on in the list: what it registers goes with it.
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"[\s\S]*Overriding a previously registered kernel")
        for name, (kernel, tensors) in KERNELS.items():
            native = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, _chosen(kernel, native, tensors), "CPU")  # type: ignore[no-untyped-call]
    _registered.append(library)


def product_bytes(a: Tensor, b: Tensor) -> int:
    """Bytes that a product has in fp32 at once beside operands and result; of fake tensors too, and of any CPU.

    Args:
        a: [M, K] or [batch, M, K].
        b: [K, N] or [batch, K, N].
    """
    if _native_is_fast(a, b):
        return 0
    M, K, N = a.shape[-2], a.shape[-1], b.shape[-1]
    step = _step(a, b)
    if a.dim() == 3:
        return 4 * min(step, a.shape[0]) * (M * K + K * N + M * N)
    longest = max(M, K, N)
    whole = M * K * N // longest if longest else 0  # what has not that dimension is there as a whole
    return 4 * (whole + min(step, longest) * (M + K + N - longest))


def attention_bytes(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> int:
    """Bytes that the backward pass of fused attention has in fp32 at once: its operands and its gradients."""
    operands = (grad_out, query, key, value, out)
    return 4 * sum(each.numel() for each in (*operands, query, key, value))


def _native_is_fast(a: Tensor, b: Tensor) -> bool:
    return a.shape[-2] <= FEW_ROWS and b.stride(-2) == 1


def _step(a: Tensor, b: Tensor) -> int:
    """Of how many matrices, or of how many indices along the longest dimension, a piece is."""
    M, K, N = a.shape[-2], a.shape[-1], b.shape[-1]
    return max(1, PIECE // (max(M * K, K * N, M * N) if a.dim() == 3 else sorted((M, K, N))[1]))


def _chosen(kernel: Callable[..., Any], native: Any, tensors: slice) -> Callable[..., Any]:
    """`kernel` where all tensors, which are at those places and `out`, have one format that needs it, and PyTorch's
    elsewhere; the last two are multiplied."""
    slow = without_instructions()

    def chosen(*args: Any, **kwargs: Any) -> Any:
        given = args[tensors]
        if given[0].dtype in slow and not _native_is_fast(*given[-2:]):
            others = (*given[1:], kwargs["out"]) if "out" in kwargs else given[1:]
            if all(each.dtype == given[0].dtype for each in others):
                return kernel(native, *args, **kwargs)
        return native.call_boxed(CPU, *args, **kwargs)

    return chosen


def _into(
    out: Tensor, a: Tensor, b: Tensor, added: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """out = beta * added + alpha * a @ b, rounded once; `added` may be `out`."""
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2] or out.shape != (*a.shape[:-1], b.shape[-1]):
        shapes = ", ".join(str(list(each.shape)) for each in (a, b, out))
        raise RuntimeError(f"matrices that cannot be multiplied, or not to such a result: {shapes}")
    begun = None if added is None or beta == 0 else added.expand_as(out)
    if a.dim() == 2 and a.shape[1] >= max(out.shape) > 0:
        total = None if begun is None else begun.float()
        for at in _slices(a.shape[1], _step(a, b)):
            total = _sum(total, a[:, at].float(), b[at].float(), beta, alpha)
            beta = 1.0
        return out.copy_(total)  # type: ignore[arg-type]
    for at, of_a, of_b in _operands(a, b):
        out[at] = _sum(None if begun is None else begun[at].float(), of_a, of_b, beta, alpha)
        del of_a, of_b
    return out


def _operands(a: Tensor, b: Tensor) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Parts of the operands in fp32 whose product is a part of the result, and its place there."""
    step = _step(a, b)
    if a.dim() == 3:
        for at in _slices(a.shape[0], step):
            yield at, a[at].float(), b[at].float()
    elif a.shape[0] > b.shape[1]:
        whole = b.float()
        for at in _slices(a.shape[0], step):
            yield at, a[at].float(), whole
    else:
        whole = a.float()
        for at in _slices(b.shape[1], step):
            yield (slice(None), at), whole, b[:, at].float()


def _slices(size: int, step: int) -> list[slice]:
    return [slice(begin, begin + step) for begin in range(0, size, step)]


def _sum(begun: Tensor | None, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """beta * begun + alpha * a @ b in fp32, in the place of `begun` if there is one."""
    if begun is not None:
        return (begun.addmm_ if begun.dim() == 2 else begun.baddbmm_)(a, b, beta=beta, alpha=alpha)
    product = a @ b
    return product if alpha == 1 else product.mul_(alpha)


def _new(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _mm(native: Any, a: Tensor, b: Tensor) -> Tensor:
    return _into(_new(a, b), a, b)


def _mm_out(native: Any, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return _into(out.resize_(*a.shape[:-1], b.shape[-1]), a, b)


def _addmm(native: Any, added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _into(_new(a, b), a, b, added, beta, alpha)


def _addmm_out(
    native: Any, added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    return _into(out.resize_(*a.shape[:-1], b.shape[-1]), a, b, added, beta, alpha)


def _addmm_(native: Any, added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _into(added, a, b, added, beta, alpha)


def _attention_backward(
    native: Any, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *rest: Any, **more: Any
) -> tuple[Tensor, ...]:
    mask = more.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        more["attn_mask"] = mask.float()
    tensors = [each.float() for each in (grad_out, query, key, value, out)]
    return tuple(each.to(query.dtype) for each in native.call_boxed(CPU, *tensors, *rest, **more))


Kernel = tuple[Callable[..., Any], slice]
"""What multiplies through fp32, from PyTorch's kernel and the arguments, and where tensors are among these."""

PRODUCTS: dict[str, Kernel] = {
    **dict.fromkeys(("mm", "bmm"), (_mm, slice(0, 2))),
    **dict.fromkeys(("mm.out", "bmm.out"), (_mm_out, slice(0, 2))),
    **dict.fromkeys(("addmm", "baddbmm"), (_addmm, slice(0, 3))),
    **dict.fromkeys(("addmm.out", "baddbmm.out"), (_addmm_out, slice(0, 3))),
    **dict.fromkeys(("addmm_", "baddbmm_"), (_addmm_, slice(0, 3))),
}
"""By operation of `aten`."""

ATTENTION_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"

KERNELS: dict[str, Kernel] = {**PRODUCTS, ATTENTION_BACKWARD: (_attention_backward, slice(0, 5))}
"""All that is registered."""
