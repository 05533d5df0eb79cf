"""Rotary position embedding (Su et al., arXiv:2104.09864) in the half-split layout of Hugging Face checkpoints.

A rotation's gradient is the rotation back, so nothing of the input is kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [..., T, head_dim / 2], of every position and frequency; made once a forward pass.

    Args:
        positions: integer positions [..., T].
        head_dim: size of a head, even.
        theta: base of the geometric series of wavelengths.
        dtype: dtype of the result; angles are computed in fp32 whatever it is.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    angles = positions.float().unsqueeze(-1) * (1.0 / theta**exponents)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x_low, x_high = x.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # a compiler fuses this form, and stumbles over writing into chunks
        return torch.cat([x_low * cos - sign * (x_high * sin), x_high * cos + sign * (x_low * sin)], dim=-1)
    out = torch.empty_like(x)
    out_low, out_high = out.chunk(2, dim=-1)
    torch.mul(x_low, cos, out=out_low).addcmul_(x_high, sin, value=-sign)
    torch.mul(x_high, cos, out=out_high).addcmul_(x_low, sin, value=sign)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1.0), None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head of x [B, heads, T, E] by its position; `cos` and `sin` broadcast as [..., T, E / 2]."""
    out: Tensor = _Rope.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out
