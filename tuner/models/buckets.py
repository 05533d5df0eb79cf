"""Attention to documents in batches of about one length.

Documents are gathered into right-padded batches, plain causal attention runs on each, and the results go back to where
the tokens stand. How long a bucket may be is measured in `benchmarks/packing.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tuner.models.attention import AttentionFn, Scoring, visible_keys

if TYPE_CHECKING:
    from tuner.models.documents import Documents

Numbers: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

BUCKET_SHARE = 0.85
"""A document shorter than this share of a bucket's longest begins the next bucket. Lower means more padding, higher
more calls: on one core 0.8 and 0.9 are about equal, 0.7 costs a tenth more and 0.5 half as much again or twice."""

BUCKET_TOKENS = {torch.float32: 1024}
"""Slots of a bucket at most, on a CPU; None is no bound. Scores of more leave the core's cache in fp32: a row of 4096
takes 78 ms in one bucket and 65 in four. In bf16 it takes 68 ms in one and 70 in four."""


@dataclass(frozen=True)
class Bucketing:
    """How the tokens of flattened rows stand in buckets one behind the other, in slots.

    Attributes:
        sizes: documents and length of each bucket.
        tokens: of each slot, the token that stands there; any where it is padding.
        slots: of each token, its slot; any for padding of the rows.
        no_token: the slots that are padding.
        no_slot: the tokens that are.
    """

    sizes: Sequence[tuple[int, int]]
    tokens: Tensor
    slots: Tensor
    no_token: Tensor
    no_slot: Tensor

    def to(self, device: torch.device) -> Bucketing:
        """The same there."""
        tensors = (self.tokens, self.slots, self.no_token, self.no_slot)
        return Bucketing(self.sizes, *(x.to(device, non_blocking=True) for x in tensors))


def bucketing(starts: Numbers, lengths: Numbers, num_tokens: int, most_tokens: int | None) -> Bucketing:
    """Batches of about equally long documents, none of more than `most_tokens` slots unless it is one document.

    Args:
        starts: of each document, its first token.
        lengths: of each document.
        num_tokens: of the flattened rows.
        most_tokens: None is no bound.
    """
    sizes, tokens, slots = [], [np.zeros(0, np.int64)], np.full(num_tokens, -1)
    taken = 0
    for group in similar(lengths, most_tokens):
        columns = np.arange(lengths[group].max())
        real = columns < lengths[group, None]
        places = np.where(real, starts[group, None] + columns, -1)
        slots[places[real]] = taken + np.flatnonzero(real)
        sizes.append((real.shape[0], real.shape[1]))
        tokens.append(places.ravel())
        taken += real.size
    joined = np.concatenate(tokens)
    found = (np.maximum(joined, 0), np.maximum(slots, 0), np.flatnonzero(joined < 0), np.flatnonzero(slots < 0))
    return Bucketing(sizes, *map(torch.from_numpy, found))


def similar(lengths: Numbers, most_tokens: int | None) -> list[list[int]]:
    """Indices of documents in groups of about one length, the longest group and in it the longest document first.

    A group has no more than `most_tokens` where each of its documents is padded to the longest, or is one document.
    """
    groups: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        longest = lengths[groups[-1][0]] if groups else 0
        full = most_tokens is not None and groups and (len(groups[-1]) + 1) * longest > most_tokens
        if not groups or full or lengths[index] < BUCKET_SHARE * longest:
            groups.append([])
        groups[-1].append(index)
    return groups


class Buckets:
    """See the module; a `Visible`.

    Args:
        documents: of the batch.
        window: a query sees this many keys, itself included; None for all.
    """

    def __init__(self, documents: Documents, window: int | None) -> None:
        self._documents = documents
        self._mask = lru_cache(None)(lambda T: visible_keys(T, window, documents.device))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # shapes change with every batch
    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, attention: AttentionFn) -> Tensor:
        B, H, T, E = q.shape
        of = self._documents.bucketing(BUCKET_TOKENS.get(q.dtype) if self._documents.device_type == "cpu" else None)
        slots_each = [n * length for n, length in of.sizes]
        moved = [_moved(flat(x), of.tokens, of.slots, of.no_slot) for x in (q, k, v)]
        parts = [torch.split(x, slots_each) for x in moved]
        outs = []
        for (n, length), *bucket in zip(of.sizes, *parts, strict=True):
            q_nHLE, k_nKLE, v_nKLE = (x.view(n, length, -1, E).transpose(1, 2) for x in bucket)
            out = attention(q_nHLE, k_nKLE, v_nKLE, scoring, self._mask(length))
            outs.append(out.transpose(1, 2).reshape(n * length, H, E))
        return _moved(torch.cat(outs), of.slots, of.tokens, of.no_token).view(B, T, H, E).transpose(1, 2)


class _Moved(torch.autograd.Function):
    """`x.index_select(0, there)`, whose gradient is read from where each row went and not added up row by row.

    PyTorch's own adds into zeros, which takes twice as long in fp32 and ten times in bf16. Reading is the same where a
    row went to one place that counts: `back` says which, and `lost` the rows that went to none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, lost: Tensor) -> Tensor:
        ctx.save_for_backward(back, lost)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back, lost = ctx.saved_tensors
        return grads[0].index_select(0, back).index_fill_(0, lost, 0), None, None, None


def _moved(x: Tensor, there: Tensor, back: Tensor, lost: Tensor) -> Tensor:
    out: Tensor = _Moved.apply(x, there, back, lost)  # type: ignore[no-untyped-call]
    return out


def flat(x_BHTE: Tensor) -> Tensor:
    """Heads of every token, [B * T, heads, E]; a view of what was projected token by token."""
    return x_BHTE.transpose(1, 2).flatten(0, 1)
