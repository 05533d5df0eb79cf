"""Adapters on layers that are separate here and one matrix in checkpoints, as q, k and v of Phi-3.

With the adapted parts of a matrix stacked by rows, `[B_q A_q; B_k A_k; B_v A_v]` is the product of a block-diagonal B
and the A's on top of each other: one adapter whose rank is the sum of theirs, and an exact one. The other way, the rows
of B that belong to a part, with those rows of A that they use, are an adapter of that part. Magnitudes and scalings of
outputs, one number a row, are stacked as the rows are; a part that has none gets those that change nothing.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tuner.peft.adapted import dense_weight
from tuner.peft.dora import row_squares
from tuner.peft.lora_linear import divisor_of
from tuner.peft.stored import Pair
from tuner.types import CausalLM, LinearSlot


@dataclass(frozen=True)
class StoredLayer:
    """A linear layer of the checkpoint: one of the model, or several stacked by rows."""

    path: str
    parts: tuple[LinearSlot, ...]

    @property
    def rows(self) -> list[int]:
        """Output features of each part."""
        return [int(slot.module.out_features) for slot in self.parts]  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the whole."""
        return sum(self.rows), int(self.parts[0].module.in_features)  # type: ignore[arg-type]


def stored_layers(model: nn.Module, without: Container[str] = ()) -> dict[str, StoredLayer]:
    """The linear layers by their names in the checkpoint, but for those of the model that are named."""
    lm = cast(CausalLM, model)
    stored_of = {part: stored for stored, parts in lm.fused.items() for part in parts}
    parts: dict[str, tuple[LinearSlot, ...]] = {}
    for slot in lm.linears():
        if slot.path not in without:
            end = next((part for part in stored_of if slot.path.endswith(f".{part}")), None)
            path = slot.path if end is None else slot.path.removesuffix(end) + stored_of[end]
            parts[path] = (*parts.get(path, ()), slot)
    return {path: StoredLayer(path, slots) for path, slots in parts.items()}


def fused(pairs: Mapping[str, Pair], layers: Mapping[str, StoredLayer], use_rslora: bool) -> dict[str, Pair]:
    """Adapters by the names of our layers -> adapters by the names of the checkpoint's."""
    adapted: dict[str, Pair] = {}
    for path, layer in layers.items():
        given = [pairs.get(slot.path) for slot in layer.parts]
        if len(given) == 1 and given[0] is not None:
            adapted[path] = given[0]
        elif any(given):
            adapted[path] = _block_diagonal(given, layer.rows, use_rslora)
            adapted[path].magnitude = _magnitudes(given, layer)
    return adapted


def _magnitudes(pairs: Sequence[Pair | None], layer: StoredLayer) -> Tensor | None:
    """Those of all rows, of a part without an adapter the norms of its own; None where no part has any."""
    given = [pair.magnitude if pair else None for pair in pairs]
    if all(part is None for part in given):
        return None
    return torch.cat([_norms(s) if m is None else m for m, s in zip(given, layer.parts, strict=True)])


def _norms(slot: LinearSlot) -> Tensor:
    return row_squares(dense_weight(slot.module)).sqrt()


def fused_vectors(vectors: Mapping[str, Tensor], layers: Mapping[str, StoredLayer]) -> dict[str, Tensor]:
    """Scalings by the names of our layers -> by those of the checkpoint's: [out, 1], or [1, in] of an input.

    Args:
        vectors: in these shapes too.
        layers: of the checkpoint.
    """
    scaled: dict[str, Tensor] = {}
    for path, layer in layers.items():
        given = [vectors.get(slot.path) for slot in layer.parts]
        like = next((vector for vector in given if vector is not None), None)
        if like is not None:
            parts = zip(given, layer.rows, strict=True)
            whole = [like.new_ones(rows, 1) if vector is None else vector for vector, rows in parts]
            scaled[path] = whole[0] if len(whole) == 1 else torch.cat(whole)
    return scaled


def split_vectors(vectors: Mapping[str, Tensor], layers: Mapping[str, StoredLayer]) -> dict[str, Tensor]:
    """The other way. A part that is all ones beside one that is not was not scaled."""
    scaled: dict[str, Tensor] = {}
    for path, vector in vectors.items():
        layer = layers[path]
        if len(layer.parts) == 1:
            scaled[path] = vector
            continue
        parts = torch.split(vector, layer.rows)
        kept = [bool((part != 1).any()) for part in parts]
        for slot, part, keep in zip(layer.parts, parts, kept, strict=True):
            if keep or not any(kept):
                scaled[slot.path] = part.clone()
    return scaled


def split(pairs: Mapping[str, Pair], layers: Mapping[str, StoredLayer], use_rslora: bool) -> dict[str, Pair]:
    """The other way; each adapter has both of its matrices, in the size of its layer."""
    adapted: dict[str, Pair] = {}
    for path, pair in pairs.items():
        layer = layers[path]
        if len(layer.parts) == 1:
            adapted[path] = pair
            continue
        A, B = _matrices(pair)
        parts = torch.split(B, layer.rows)
        sizes = [None] * len(parts) if pair.magnitude is None else torch.split(pair.magnitude, layer.rows)
        for slot, B_part, used, magnitude in zip(layer.parts, parts, _used(parts), sizes, strict=True):
            if magnitude is not None and not used.any() and _changes(slot, magnitude):
                used[:] = True
            if used.any():
                rank = int(used.sum())
                alpha = pair.alpha * divisor_of(rank, use_rslora) / divisor_of(pair.rank, use_rslora)
                kept = None if magnitude is None else magnitude.clone()
                adapted[slot.path] = Pair(rank, alpha, A[used].clone(), B_part[:, used].clone(), magnitude=kept)
    return adapted


def _changes(slot: LinearSlot, magnitude: Tensor) -> bool:
    """Whether rows of which no adapter changes the direction get another magnitude than they have."""
    norms = _norms(slot)
    # 1 %: those of a base in bf16, or in another form than the one that was saved of, differ by less from each other.
    return not norms.is_meta and not torch.allclose(norms, magnitude.to(norms), rtol=1e-2)


def _matrices(pair: Pair) -> tuple[Tensor, Tensor]:
    assert pair.A is not None and pair.B is not None  # noqa: PT018
    return pair.A, pair.B


def _block_diagonal(pairs: Sequence[Pair | None], rows: Sequence[int], use_rslora: bool) -> Pair:
    """One adapter of the stacked parts; those without one get zeros."""
    there = [pair for pair in pairs if pair is not None]
    scales = [pair.alpha / divisor_of(pair.rank, use_rslora) for pair in there]
    A = torch.cat([_matrices(pair)[0] for pair in there])
    B = A.new_zeros(sum(rows), len(A))
    row = column = 0
    for pair, count in zip(pairs, rows, strict=True):
        if pair is not None:
            part, scale = _matrices(pair)[1], pair.alpha / divisor_of(pair.rank, use_rslora)
            same = scale == scales[0]  # as where one method adapted all of them: then nothing is rounded
            B[row : row + count, column : column + pair.rank] = part if same else part * (scale / scales[0])
            column += pair.rank
        row += count
    return Pair(len(A), scales[0] * divisor_of(len(A), use_rslora), A, B)


def _used(parts: Sequence[Tensor]) -> list[Tensor]:
    """Which rows of A each part of B uses: those with a column of its B that is not zero.

    A part whose B is zero throughout starts as the identity. It has the rows that no other part uses, which are its own
    block; where there are none it was not adapted; and where all of B is zero each part has all rows.
    """
    used = [(part != 0).any(dim=0) for part in parts]
    left = ~torch.stack(used).any(dim=0)
    return [mine if mine.any() else left for mine in used]
