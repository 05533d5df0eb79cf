"""Causal attention with grouped queries, in the form that is fastest where the run is.

`sdpa` is PyTorch's fused kernel: the choice on a GPU and for long sequences, because it never holds the scores. On a
CPU plain matrix products are faster for short sequences, in bf16 by a factor of two (`docs/log.md`), so there
`explicit` multiplies the matrices itself: the queries of one key/value head are stacked into one matrix, so no key or
value is repeated. Right-padded batches need no mask: a real token never sees a later one. Where a sliding window hides
more than the future, one mask is made a forward pass for all layers that see alike. Scores that are capped (Gemma 2)
are beyond the fused kernel, so they are explicit. The documents of packed rows are taken apart around all of this
(`tuner.models.documents`).

Letters as in `tuner.types`; G = H / K query heads share a key/value head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.keeping import kernel, product

EXPLICIT_MAX_TOKENS = {torch.float32: 128, torch.bfloat16: 512}
"""Up to which length `explicit` is chosen on a CPU. On one core (4 sequences, 8 query heads, 2 key heads of 64, forward
and backward) it takes 26 ms where the fused kernel takes 25 ms at 256 tokens in fp32, and 169 against 97 ms at 512; in
bf16 13 against 29 ms and 58 against 96 ms, and the kernel wins from 768 on. It also keeps the [T, T] probabilities of
every layer for backward: at 512 tokens 1.2 GiB in bf16 for 8 sequences, 9 heads and 30 layers."""


@dataclass(frozen=True)
class Scoring:
    """How a layer's scores are made of queries and keys.

    Attributes:
        scale: what their products are multiplied with.
        softcap: scores s become `softcap * tanh(s / softcap)` (Gemma 2, arXiv:2408.00118); None leaves them.
    """

    scale: float
    softcap: float | None = None


AttentionFn = Callable[[Tensor, Tensor, Tensor, Scoring, Tensor | None], Tensor]
"""(q [B, H, T, E], k [B, K, T, E], v [B, K, T, E], scoring, visible) -> [B, H, T, E]. `visible` is boolean, [T, T],
true where a query (row) sees a key; None is everything up to itself."""


class Visible(Protocol):
    """What the queries of a layer see of their rows."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, attention: AttentionFn) -> Tensor:
        """Attention to it by means of `attention`; shapes as for `AttentionFn`."""


@dataclass(frozen=True)
class OneText:
    """Each row is one text: a `Visible` of whole rows.

    Attributes:
        mask: as `AttentionFn` takes it.
    """

    mask: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, attention: AttentionFn) -> Tensor:
        return attention(q, k, v, scoring, self.mask)


EVERYTHING_BEFORE = OneText(None)


def visible_keys(T: int, window: int | None, device: torch.device) -> Tensor | None:
    """What each of T queries sees, as `AttentionFn` takes it; None where that is all that is not later.

    Args:
        T: tokens of a text.
        window: a query sees this many keys, itself included; None for all.
        device: where the mask is made.
    """
    if window is None or window >= T:
        return None
    return torch.ones(T, T, dtype=torch.bool, device=device).tril_().triu_(1 - window)


class _Explicit(torch.autograd.Function):
    """softmax(score(q, k) + mask) v; keeps q, k, v and the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, scoring: Scoring, visible: Tensor | None
    ) -> Tensor:
        B, H, T, E = q_BHTE.shape
        K = k_BKTE.shape[1]
        q_BKGTE = q_BHTE.reshape(B, K, H // K * T, E)
        mask = _additive_mask(visible, T, q_BHTE)
        q, k = q_BKGTE.flatten(0, 1), k_BKTE.flatten(0, 1)
        if scoring.softcap is None:
            # Adding -inf takes a third of the time of masked_fill_, and scaling within the product takes none.
            scores = torch.baddbmm(mask.repeat(H // K, 1), q, k.transpose(-1, -2), alpha=scoring.scale)
        else:
            tanh = _tanh_scores(q, k, scoring).view(B, H, T, T)
            scores = torch.add(mask, tanh, alpha=scoring.softcap, out=tanh)
        p = torch.softmax(scores, dim=-1, out=scores).view(B, K, H // K * T, T)  # row by row, in their own place
        ctx.save_for_backward(q_BKGTE, k_BKTE, v_BKTE, p)
        ctx.scoring = scoring
        return product(lambda: p @ v_BKTE).view(B, H, T, E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        scoring: Scoring = ctx.scoring
        B, H, T, E = grads[0].shape
        grad_out = grads[0].reshape(q.shape)
        grad_v = p.transpose(-1, -2) @ grad_out
        grad_p = grad_out @ v.transpose(-1, -2)
        grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype, grad_input=grad_p)
        if scoring.softcap is not None:  # made again, not kept: as large as the probabilities
            tanh = _tanh_scores(q.flatten(0, 1), k.flatten(0, 1), scoring).view_as(p)
            torch.ops.aten.tanh_backward.grad_input(grad_scores, tanh, grad_input=grad_scores)
        grad_q = (grad_scores @ k).mul_(scoring.scale).view(B, H, T, E)
        grad_k = (grad_scores.transpose(-1, -2) @ q).mul_(scoring.scale)
        return grad_q, grad_k, grad_v, None, None


def _tanh_scores(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    assert scoring.softcap is not None
    none = q.new_empty(())
    scaled = torch.baddbmm(none, q, k.transpose(-1, -2), beta=0, alpha=scoring.scale / scoring.softcap)
    return scaled.tanh_()


def _additive_mask(visible: Tensor | None, T: int, like: Tensor) -> Tensor:
    """0 where a key is seen and -inf elsewhere, [T, T]."""
    mask = torch.full((T, T), -math.inf, dtype=like.dtype, device=like.device)
    return mask.triu_(1) if visible is None else mask.masked_fill_(visible, 0.0)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, visible: Tensor | None = None) -> Tensor:
    """By plain matrix products; see `AttentionFn`. Gradients of first order."""
    out: Tensor = _Explicit.apply(q, k, v, scoring, visible)  # type: ignore[no-untyped-call]
    return out


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, visible: Tensor | None = None) -> Tensor:
    """By `torch.nn.functional.scaled_dot_product_attention`, or explicit where scores are capped; see `AttentionFn`."""
    if scoring.softcap is not None:
        return explicit_attention(q, k, v, scoring, visible)
    with kernel():
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=scoring.scale, enable_gqa=True
        )


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, visible: Tensor | None = None) -> Tensor:
    """The faster of the two on a CPU, by length and dtype."""
    attend = explicit_attention if q.shape[2] <= EXPLICIT_MAX_TOKENS.get(q.dtype, 0) else sdpa_attention
    return attend(q, k, v, scoring, visible)


def attention_for(device_type: str) -> AttentionFn:
    """The attention for `cpu` or `cuda`, chosen once when a model is built."""
    return cpu_attention if device_type == "cpu" else sdpa_attention


def cached_attention(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    scoring: Scoring,
    window: int | None,
    padding_B: Tensor | None,
) -> Tensor:
    """New queries over all S cached keys: query i sees keys up to S - T + i. For generation, no gradient.

    Args:
        q_BHTE, k_BKSE, v_BKSE: the T newest queries, and all keys and values.
        scoring: of the layer.
        window: a query sees this many keys, itself included; None for all.
        padding_B: how many keys at the left of each row nobody sees; a query among them sees itself, because one that
            saw nothing would be NaN, and so would all that is multiplied with it.
    """
    T, S, device = q_BHTE.shape[2], k_BKSE.shape[2], q_BHTE.device
    seen = torch.ones(T, S, dtype=torch.bool, device=device).tril_(S - T)
    if window is not None:
        seen = seen.triu_(S - T + 1 - window)
    if padding_B is not None:
        keys_S = torch.arange(S, device=device)
        itself = keys_S == keys_S[S - T :, None]
        seen = (seen & (keys_S >= padding_B[:, None, None]) | itself).unsqueeze(1)
    if scoring.softcap is None:
        return F.scaled_dot_product_attention(
            q_BHTE, k_BKSE, v_BKSE, attn_mask=seen, scale=scoring.scale, enable_gqa=True
        )
    B, H, _, E = q_BHTE.shape
    K = k_BKSE.shape[1]
    q_BKGTE, k = q_BHTE.view(B, K, H // K, T, E), k_BKSE.unsqueeze(2)
    scores = (q_BKGTE @ k.transpose(-1, -2)).mul_(scoring.scale / scoring.softcap).tanh_().mul_(scoring.softcap)
    scores = scores.masked_fill_(~(seen if seen.dim() == 2 else seen.unsqueeze(1)), -math.inf)
    return (torch.softmax(scores, dim=-1) @ v_BKSE.unsqueeze(2)).view(B, H, T, E)
