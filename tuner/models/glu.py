"""The gated activations `act(gate) * up` (Shazeer, arXiv:2002.05202), which keep two inputs for backward and no more.

Autograd alone would also keep `act(gate)`: a third of what an MLP keeps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grads[0])
        grad_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return grad_gate, grad_up


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.gelu(gate, approximate="tanh").mul_(grads[0])
        grad_gate = torch.ops.aten.gelu_backward(grads[0] * up, gate, approximate="tanh")
        return grad_gate, grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise over equal shapes."""
    out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu(gate) * up` with the tanh form of GELU, elementwise over equal shapes."""
    out: Tensor = _GeGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


ACTIVATIONS = {"silu": swiglu, "gelu_pytorch_tanh": geglu}
"""By the words of `config.json`."""
