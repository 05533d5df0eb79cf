"""Rotary position embedding (Su et al., arXiv:2104.09864) in the half-split layout of Hugging Face checkpoints.

A rotation's gradient is the rotation back, so nothing of the input is kept for backward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

REQUIRED_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings", "factor"),
}
"""What each `rope_type` of a scaling needs to be told, by the names of Hugging Face's `config.json`."""

OPTIONAL_KEYS = {"longrope": ("attention_factor",)}
"""What it may be told besides."""

LISTS = ("short_factor", "long_factor")
"""Keys that hold a number for each frequency."""

Scaling = Mapping[str, Any]


def scaling_problem(scaling: Scaling, head_dim: int) -> str | None:
    """What is wrong with a scaling, None where nothing is."""
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in REQUIRED_KEYS:
        return f"rope_type={kind!r} is not supported; valid: default, {', '.join(REQUIRED_KEYS)}"
    needed, optional = REQUIRED_KEYS[kind], OPTIONAL_KEYS.get(kind, ())
    if missing := [key for key in needed if key not in scaling]:
        return f"rope_type={kind!r} lacks {', '.join(missing)}"
    if unknown := [key for key in scaling if key not in ("rope_type", *needed, *optional)]:
        return f"rope_type={kind!r} has no {', '.join(unknown)}; valid: {', '.join([*needed, *optional])}"
    for key in [key for key in (*needed, *optional) if key in scaling]:
        values = scaling[key] if key in LISTS else [scaling[key]]
        if key in LISTS and (not isinstance(values, list) or len(values) != head_dim // 2):
            return f"rope_type={kind!r}: {key} is no list of {head_dim // 2} numbers, one a frequency"
        if wrong := [value for value in values if not _is_positive(value)]:
            return f"rope_type={kind!r}: {key}={wrong[0]!r} is no number > 0"
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        return "rope_type='llama3': high_freq_factor must be larger than low_freq_factor"
    return None


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def rope_frequencies(
    head_dim: int, theta: float, scaling: Scaling | None, device: torch.device | None, *, is_long: bool = False
) -> Tensor:
    """Radians a position of each pair of a head, fp32 [head_dim / 2], the fastest first.

    `linear` divides all of them (position interpolation, arXiv:2306.15595). `llama3` divides those whose wavelength is
    longer than the context the model was first trained with, keeps the short ones and blends between (Llama 3.1's
    reference code, `apply_scaling`). `longrope` divides each by a number of its own, found by search, one set for texts
    within the first context and one for longer ones (arXiv:2402.13753).

    Args:
        head_dim: size of a head, even.
        theta: base of the geometric series of wavelengths.
        scaling: `rope_type` and its keys, or None for the series as it is.
        device: where the result is.
        is_long: whether the text is longer than the first context; counts for `longrope` alone.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    wavelengths: Tensor = theta**exponents  # over 2 pi
    if scaling is None:
        return 1.0 / wavelengths
    if scaling["rope_type"] == "longrope":
        factors = torch.tensor(scaling["long_factor" if is_long else "short_factor"], device=device)
        return 1.0 / (factors.float() * wavelengths)
    frequencies = 1.0 / wavelengths
    factor: float = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)  # within the first context
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    blended: Tensor = (1 - kept) * frequencies / factor + kept * frequencies
    return blended


def context_of_short_factors(scaling: Scaling | None) -> int | None:
    """The number of tokens up to which `longrope` uses its short factors; None for what does not depend on length."""
    if scaling is None or scaling["rope_type"] != "longrope":
        return None
    return int(scaling["original_max_position_embeddings"])


def _magnitude(scaling: Scaling | None) -> float:
    """What `longrope` multiplies cosine and sine with, so that attention over more tokens stays as sharp."""
    if scaling is None or scaling["rope_type"] != "longrope":
        return 1.0
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    default = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return float(scaling.get("attention_factor") or default)


def rope_table(
    positions: Tensor, head_dim: int, theta: float, scaling: Scaling | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [..., T, head_dim / 2], of every position and frequency; made once a forward pass.

    Args:
        positions: integer positions [..., T].
        head_dim, theta, scaling: as for `rope_frequencies`.
        dtype: dtype of the result; angles are computed in fp32 whatever it is.
    """
    context = context_of_short_factors(scaling)
    is_long = context is not None and int(positions.max()) >= context  # CPU-GPU sync point, for longrope alone
    frequencies = rope_frequencies(head_dim, theta, scaling, positions.device, is_long=is_long)
    angles = positions.float().unsqueeze(-1) * frequencies
    magnitude = _magnitude(scaling)
    cos, sin = angles.cos(), angles.sin()
    if magnitude != 1.0:
        cos, sin = cos * magnitude, sin * magnitude
    return cos.to(dtype), sin.to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    if x.dtype != cos.dtype:  # rounded once, at the end
        return _rotate(x.to(cos.dtype), cos, sin, sign).to(x.dtype)
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
    """Rotate each head of x [B, heads, T, E] by its position, in the dtype of `cos` and `sin` [..., T, E / 2]."""
    out: Tensor = _Rope.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out
