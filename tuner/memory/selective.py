"""Selective activation checkpointing: a layer keeps its matrix products and attention and computes the rest again.

What is computed again, norms, rotations, activations and the rank-R halves of adapters, is a small part of a layer's
time and a large part of its memory (Korthikanti et al., arXiv:2205.05198).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tuner.keeping import during

KERNELS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
    }
)
"""What is kept of calls that autograd knows. Products of batches of matrices are not: they are [T, T] scores."""


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation.name() in KERNELS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class _First:
    """The forward pass."""

    def __init__(self) -> None:
        self.products: deque[tuple[Tensor, int]] = deque()
        self.kernels: deque[AbstractContextManager[object]] = deque()

    def product(self, compute: Callable[[], Tensor]) -> Tensor:
        result = compute()
        # Detached: the result itself gets a place in the graph, which in turn holds this.
        self.products.append((result.detach(), result._version))
        return result

    def kernel(self) -> AbstractContextManager[object]:
        first, again = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
        self.kernels.append(again)
        return first  # type: ignore[no-any-return]


class _Again:
    """The same pass in backward; each result is given up as it is taken."""

    def __init__(self, first: _First) -> None:
        self._first = first

    def product(self, _: Callable[[], Tensor]) -> Tensor:
        kept, version = self._first.products.popleft()
        if kept._version != version:
            raise RuntimeError("a product that selective checkpointing keeps was written into")
        return kept

    def kernel(self) -> AbstractContextManager[object]:
        return self._first.kernels.popleft()


def passes() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a layer's forward pass and of the second one, as `torch.utils.checkpoint.checkpoint` wants them."""
    first = _First()
    return during(first), during(_Again(first))
