"""Batches of training samples in an order that anyone can compute again.

The order of an epoch follows from seed, epoch and the data's fingerprint alone: not from torch's or NumPy's generators,
whose permutations may change with their version, and not from how far another process got or how many there are. So a
position is two integers, and a run which is resumed sees exactly the samples it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from tuner.errors import CheckpointError
from tuner.types import IGNORE, Batch, EpochOrder, Sample


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Samples as one right-padded batch: tokens and labels int64 [B, T], labels `IGNORE` where there is padding.

    Right padding keeps every token at its own position, and under a causal mask no token sees the padding behind it.
    """
    tokens, labels = _rows([[sample] for sample in samples], pad_id)
    return Batch(tokens, labels, [len(sample.tokens) for sample in samples])


def collate_packed(rows: Sequence[Sequence[Sample]], pad_id: int) -> Batch:
    """Rows of samples one behind the other, right-padded, as one batch that knows its documents.

    The first token of a document is no target: what stands before it is another document's last.
    """
    tokens, labels = _rows(rows, pad_id)
    documents = tuple(tuple(len(sample.tokens) for sample in row) for row in rows)
    for row, lengths in enumerate(documents):
        labels[row, np.cumsum([0, *lengths[:-1]])] = IGNORE
    return Batch(tokens, labels, [sum(lengths) for lengths in documents], documents)


def _rows(rows: Sequence[Sequence[Sample]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [B, T] of right-padded rows, T being the longest."""
    shape = (len(rows), max(sum(len(sample.tokens) for sample in row) for row in rows))
    tokens = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    for row, samples in enumerate(rows):
        start = 0
        for sample in samples:
            end = start + len(sample.tokens)
            tokens[row, start:end] = sample.tokens
            labels[row, start:end] = sample.labels
            start = end
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def batches_by_length(
    samples: Sequence[Sample], batch_size: int, pad_id: int, ids: Sequence[int] | None = None
) -> list[Batch]:
    """All samples in batches of neighbours in length, longest first.

    Sums of losses over the whole do not depend on the grouping; padding, and so time, does. The longest come first
    because a batch that does not fit into memory should fail at once.

    Args:
        samples: in any order.
        batch_size: samples of a batch.
        pad_id: token written behind short samples.
        ids: what `Batch.sample_ids` calls each sample; None for its place in `samples`.
    """
    numbered = zip(range(len(samples)) if ids is None else ids, samples, strict=True)
    ordered = sorted(numbered, key=lambda pair: -len(pair[1].tokens))
    cut = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    return [
        replace(collate([sample for _, sample in part], pad_id), sample_ids=tuple(number for number, _ in part))
        for part in cut
    ]


def share(window: Sequence[int], rank: int, world: int) -> Sequence[int]:
    """What one of `world` processes takes of a window: all shares together are the window, each entry once.

    Entries are dealt one by one, so that shares of a window sorted by length take about equally long. A window of fewer
    entries than there are processes leaves some of them nothing.
    """
    return window[rank::world]


@dataclass(frozen=True)
class Position:
    """What has been handed out: `epoch` whole epochs and `index` rows of the next."""

    epoch: int = 0
    index: int = 0


class Batches:
    """Endless iterator over windows, what one optimizer step trains on, each a list of micro-batches.

    The rows of a window are sorted by length before they are cut into micro-batches. Every sample occurs exactly once
    per epoch, whatever the number of processes; the last window of an epoch may be smaller, and no window reaches into
    the next epoch.

    Args:
        samples: the training samples, at least one.
        order: in which rows they are trained on: a sample each, or packed.
        batch_size: rows of a micro-batch.
        accumulation: micro-batches of a window.
        pad_id: token written behind short rows.
        rank, world: which of how many processes this is; each takes its share of every window.

    Attributes:
        position: may be read and set between windows; equal positions continue equally.
        steps_per_epoch: windows of an epoch.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        order: EpochOrder,
        *,
        batch_size: int,
        accumulation: int,
        pad_id: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.position = Position()
        self._samples = samples
        self._order = order
        self._batch_size = batch_size
        self._window = batch_size * accumulation * world
        self._pad_id = pad_id
        self._rank, self._world = rank, world
        self.steps_per_epoch = -(-order.num_rows // self._window)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        epoch, index = self.position.epoch, self.position.index
        chosen = self._order.rows(epoch)[index : index + self._window]
        after = index + len(chosen)
        self.position = Position(epoch, after) if after < self._order.num_rows else Position(epoch + 1, 0)
        rows = [[self._samples[i] for i in row] for row in chosen]
        lengths = [sum(len(sample.tokens) for sample in row) for row in rows]
        by_length = sorted(range(len(rows)), key=lambda i: -lengths[i])
        mine = share(by_length, self._rank, self._world)
        cut = [mine[i : i + self._batch_size] for i in range(0, len(mine), self._batch_size)]
        return [self._batch([rows[i] for i in part], [chosen[i] for i in part]) for part in cut]

    def _batch(self, rows: Sequence[Sequence[Sample]], ids: Sequence[Sequence[int]]) -> Batch:
        samples = list(chain.from_iterable(rows))
        batch = collate_packed(rows, self._pad_id) if self._order.packed else collate(samples, self._pad_id)
        return replace(batch, sample_ids=tuple(chain.from_iterable(ids)))

    @property
    def at_epoch_end(self) -> bool:
        return self.position.index == 0 and self.position.epoch > 0

    @property
    def epochs_done(self) -> int:
        return self.position.epoch

    def described(self) -> Mapping[str, Any]:
        return self._order.described()

    def state_dict(self) -> dict[str, Any]:
        fingerprint = self._order.fingerprint
        return {"epoch": self.position.epoch, "index": self.position.index, "fingerprint": fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position in the same data.

        Raises:
            CheckpointError: it is of other data.
        """
        if (before := state["fingerprint"]) != (now := self._order.fingerprint):
            raise CheckpointError(
                f"the data is not what this run began with: its fingerprint was {before[:16]} and is "
                f"{now[:16]}; give another out, or the data as it was"
            )
        self.position = Position(state["epoch"], state["index"])
