"""Attention in packed rows, where a token sees its own document and no other.

A row is several documents one behind the other. All that works token by token runs on the rows as they are; attention
alone takes the documents apart, so no mask of a row's length squared is ever made:

- `Buckets` (`tuner.models.buckets`) gathers documents of about one length into right-padded batches, runs plain causal
  attention on each, and puts the results back. This is the way on a CPU, and on a GPU for what the kernel below cannot
  do (fp32, capped scores). A mask over whole rows takes 1.4 to 34 times as long, one call a document 1.0 to 1.5 times.
- `Varlen` hands rows and boundaries to FlashAttention's kernel for texts of varying length, which is PyTorch's
  `torch.nn.attention.varlen`: bf16 on a GPU, heads of at most 256 numbers.

FlexAttention was not taken: PyTorch has no backward of it on a CPU, and compiled its forward alone takes 2 to 4 times
as long as buckets; without its compiler it makes the whole mask, and with it each new shape of a batch is compiled.
Nested tensors have no causal attention on a CPU. All of it is measured in `benchmarks/packing.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tuner.keeping import kernel
from tuner.models.attention import AttentionFn, Scoring, Visible
from tuner.models.buckets import Bucketing, Buckets, bucketing, flat
from tuner.types import DeviceType

Lengths = Sequence[Sequence[int]]
"""Of each row the lengths of its documents, in their order; what is behind the last is padding."""


class Documents:
    """Where the documents of a packed batch [B, T] stand. Made once a forward pass, for all layers.

    Args:
        lengths: of the documents.
        shape: B and T.
        device: where the tensors are.
        device_type: whose kernels attention has; None is that of `device`.

    Raises:
        ValueError: lengths that are no division of B rows of T tokens.
    """

    def __init__(
        self, lengths: Lengths, shape: tuple[int, int], device: torch.device, device_type: DeviceType | None = None
    ) -> None:
        B, T = shape
        if len(lengths) != B or any(sum(row) > T or min(row, default=1) < 1 for row in lengths):
            raise ValueError(f"documents of lengths {lengths} are no division of {B} rows of {T} tokens")
        self.num_tokens, self.shape, self.device = B * T, shape, device
        self.device_type = device_type or device.type
        self.lengths = np.array([n for row in lengths for n in row], dtype=np.int64)
        offsets = [np.cumsum([0, *row[:-1]]) + T * i for i, row in enumerate(lengths) if row]
        self.starts = np.concatenate(offsets) if offsets else self.lengths
        """Of each document, its first token's place in the flattened rows."""
        self._bucketings: dict[int | None, Bucketing] = {}

    @property
    def positions(self) -> Tensor:
        """The place of each token in its document and 0 in padding, [B, 1, T] (for all heads)."""
        found = np.zeros(self.num_tokens, dtype=np.int64)
        for start, length in zip(self.starts, self.lengths, strict=True):
            found[start : start + length] = np.arange(length)
        return torch.from_numpy(found).view(self.shape[0], 1, self.shape[1]).to(self.device, non_blocking=True)

    def bucketing(self, most_tokens: int | None) -> Bucketing:
        """See `tuner.models.buckets.bucketing`; made once for all layers."""
        if most_tokens not in self._bucketings:
            made = bucketing(self.starts, self.lengths, self.num_tokens, most_tokens)
            self._bucketings[most_tokens] = made.to(self.device)
        return self._bucketings[most_tokens]

    @cached_property
    def boundaries(self) -> tuple[Tensor, int]:
        """Where documents begin, and the end of all, as int32; and the longest. Padding counts as a document here."""
        ends = np.concatenate([self.starts + self.lengths, np.arange(self.shape[0] + 1) * self.shape[1]])
        cuts = np.unique(ends).astype(np.int32)
        return torch.from_numpy(cuts).to(self.device, non_blocking=True), int(np.diff(cuts).max())

    def visible(self, window: int | None, dtype: torch.dtype, scoring: Scoring, head_dim: int) -> Visible:
        """What layers of this window see, in the form that is fastest here."""
        possible = dtype is torch.bfloat16 and scoring.softcap is None and head_dim % 8 == 0 and head_dim <= 256
        return Varlen(self, window) if possible and self.device_type == "cuda" else Buckets(self, window)


class Varlen:
    """See the module; a `Visible`."""

    def __init__(self, documents: Documents, window: int | None) -> None:
        self._documents = documents
        self._before = -1 if window is None else window - 1  # keys before a query; -1 is all

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, attention: AttentionFn) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        B, H, T, E = q.shape
        cuts, longest = self._documents.boundaries
        with kernel():
            out = varlen_attn(
                flat(q),
                flat(k),
                flat(v),
                cuts,
                cuts,
                longest,
                longest,
                scale=scoring.scale,
                window_size=(self._before, 0),
                enable_gqa=True,
            )
        return out.view(B, T, H, E).transpose(1, 2)  # type: ignore[union-attr]
