"""Causal attention with grouped queries, in the form that is fastest where the run is.

`sdpa` is PyTorch's fused kernel: the choice on a GPU and for long sequences, because it never holds the scores. On a
CPU plain matrix products took less than half its time at 256 tokens with two threads (`docs/log.md`, also for where
that ends), so `explicit` multiplies the matrices itself: the queries of one key/value head are stacked
into one matrix, so no key or value is repeated. Right-padded batches need no mask: a real token never sees a later one.

Letters as in `tuner.types`; G = H / K query heads share a key/value head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]

EXPLICIT_MAX_TOKENS = 512
"""`explicit` keeps the [T, T] probabilities of every layer for backward: at 512 tokens 2.3 GiB in fp32 for 8 sequences,
9 heads and 30 layers, at 1024 tokens four times that. Nor is it faster much further: on one core it takes as long as
the fused kernel, forward and backward, at 512 tokens in fp32 and at 768 in bf16, and twice as long at 1024 in fp32."""


class _ExplicitCausal(torch.autograd.Function):
    """softmax(q kᵀ / sqrt(E)) v below the diagonal; keeps q, k, v and the probabilities."""

    @staticmethod
    def forward(ctx: Any, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
        B, H, T, E = q_BHTE.shape
        K = k_BKTE.shape[1]
        scale = 1.0 / math.sqrt(E)
        q_BKGTE = q_BHTE.reshape(B, K, H // K * T, E)
        # Adding -inf takes a third of the time of masked_fill_, and scaling within the product takes none.
        future = torch.full((T, T), -math.inf, dtype=q_BHTE.dtype, device=q_BHTE.device).triu_(1).repeat(H // K, 1)
        q, k = q_BKGTE.flatten(0, 1), k_BKTE.flatten(0, 1)
        scores = torch.baddbmm(future, q, k.transpose(-1, -2), alpha=scale)
        p = torch.softmax(scores, dim=-1).view(B, K, H // K * T, T)
        ctx.save_for_backward(q_BKGTE, k_BKTE, v_BKTE, p)
        ctx.scale = scale
        return (p @ v_BKTE).view(B, H, T, E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, p = ctx.saved_tensors
        B, H, T, E = grads[0].shape
        grad_out = grads[0].reshape(q.shape)
        grad_v = p.transpose(-1, -2) @ grad_out
        grad_p = grad_out @ v.transpose(-1, -2)
        grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
        grad_q = (grad_scores @ k).mul_(ctx.scale).view(B, H, T, E)
        grad_k = (grad_scores.transpose(-1, -2) @ q).mul_(ctx.scale)
        return grad_q, grad_k, grad_v


def explicit_causal_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
    """Causal attention by plain matrix products, [B, H, T, E]; gradients of first order."""
    out: Tensor = _ExplicitCausal.apply(q_BHTE, k_BKTE, v_BKTE)  # type: ignore[no-untyped-call]
    return out


def sdpa_causal_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
    """Causal attention by `torch.nn.functional.scaled_dot_product_attention`, [B, H, T, E]."""
    return F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=True)


def cpu_causal_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
    """The faster of the two on a CPU, by length."""
    if q_BHTE.shape[2] <= EXPLICIT_MAX_TOKENS:
        return explicit_causal_attention(q_BHTE, k_BKTE, v_BKTE)
    return sdpa_causal_attention(q_BHTE, k_BKTE, v_BKTE)


def causal_attention_for(device_type: str) -> AttentionFn:
    """The attention for `cpu` or `cuda`, chosen once when a model is built."""
    return cpu_causal_attention if device_type == "cpu" else sdpa_causal_attention


def cached_attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, padding_B: Tensor | None = None) -> Tensor:
    """New queries over all S cached keys: query i sees keys up to S - T + i. For generation, no gradient.

    Args:
        q_BHTE, k_BKSE, v_BKSE: the T newest queries, and all keys and values.
        padding_B: how many keys at the left of each row nobody sees; a query among them sees itself, because one that
            saw nothing would be NaN, and so would all that is multiplied with it.
    """
    T, S, device = q_BHTE.shape[2], k_BKSE.shape[2], q_BHTE.device
    seen = torch.ones(T, S, dtype=torch.bool, device=device).tril_(S - T)
    if padding_B is not None:
        keys_S = torch.arange(S, device=device)
        itself = keys_S == keys_S[S - T :, None]
        seen = (seen & (keys_S >= padding_B[:, None, None]) | itself).unsqueeze(1)
    return F.scaled_dot_product_attention(q_BHTE, k_BKSE, v_BKSE, attn_mask=seen, enable_gqa=True)
