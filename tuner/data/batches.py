"""Batches of training samples in an order that anyone can compute again.

The order of an epoch follows from seed, epoch and the data's fingerprint alone: not from torch's or NumPy's generators,
whose permutations may change with their version, and not from how far another process got. So a position is two
integers, and a run which is resumed sees exactly the samples it would have seen.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tuner.errors import CheckpointError
from tuner.types import IGNORE, Batch, Sample


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Samples as one right-padded batch: tokens and labels int64 [B, T], labels `IGNORE` where there is padding.

    Right padding keeps every token at its own position, and under a causal mask no token sees the padding behind it.
    """
    shape = (len(samples), max(len(sample.tokens) for sample in samples))
    tokens = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = sample.tokens
        labels[row, : len(sample.labels)] = sample.labels
    num_tokens = sum(len(sample.tokens) for sample in samples)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), num_tokens)


def batches_by_length(samples: Sequence[Sample], batch_size: int, pad_id: int) -> list[Batch]:
    """All samples in batches of neighbours in length, longest first.

    Sums of losses over the whole do not depend on the grouping; padding, and so time, does. The longest come first
    because a batch that does not fit into memory should fail at once.
    """
    ordered = sorted(samples, key=lambda sample: -len(sample.tokens))
    return [collate(ordered[i : i + batch_size], pad_id) for i in range(0, len(ordered), batch_size)]


@dataclass(frozen=True)
class Position:
    """What has been handed out: `epoch` whole epochs and `index` samples of the next."""

    epoch: int = 0
    index: int = 0


class Batches:
    """Endless iterator over windows, the samples of one optimizer step, each a list of micro-batches.

    The samples of a window are sorted by length before they are cut into micro-batches. Every sample occurs exactly
    once per epoch; the last window of an epoch may be smaller, and no window reaches into the next epoch.

    Args:
        samples: the training samples, at least one.
        batch_size: samples of a micro-batch.
        accumulation: micro-batches of a window.
        pad_id: token written behind short samples.
        seed: with `fingerprint` and the epoch, decides the order.
        fingerprint: `Dataset.fingerprint`.

    Attributes:
        position: may be read and set between windows; equal positions continue equally.
        steps_per_epoch: windows of an epoch.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        batch_size: int,
        accumulation: int,
        pad_id: int,
        seed: int,
        fingerprint: str,
    ) -> None:
        if not samples:
            raise ValueError("no samples to make batches of")
        self.position = Position()
        self._samples = samples
        self._batch_size = batch_size
        self._window = batch_size * accumulation
        self._pad_id = pad_id
        self._seed = seed
        self._fingerprint = fingerprint
        self._order: tuple[int, list[int]] | None = None
        self.steps_per_epoch = -(-len(samples) // self._window)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        epoch, index = self.position.epoch, self.position.index
        chosen = self._order_of(epoch)[index : index + self._window]
        after = index + len(chosen)
        self.position = Position(epoch, after) if after < len(self._samples) else Position(epoch + 1, 0)
        return batches_by_length([self._samples[i] for i in chosen], self._batch_size, self._pad_id)

    @property
    def at_epoch_end(self) -> bool:
        return self.position.index == 0 and self.position.epoch > 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.position.epoch, "index": self.position.index, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position in the same data.

        Raises:
            CheckpointError: it is of other data.
        """
        if (before := state["fingerprint"]) != self._fingerprint:
            raise CheckpointError(
                f"the data is not what this run began with: its fingerprint was {before[:16]} and is "
                f"{self._fingerprint[:16]}; give another out, or the data as it was"
            )
        self.position = Position(state["epoch"], state["index"])

    def _order_of(self, epoch: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._samples), self._seed, epoch, self._fingerprint))
        return self._order[1]


def epoch_order(num_samples: int, seed: int, epoch: int, fingerprint: str) -> list[int]:
    """A permutation of `range(num_samples)` that is a function of the arguments alone.

    Sorts by draws of `random.Random.random`, the one method whose sequence Python promises never to change.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{fingerprint}".encode()).digest()
    generator = random.Random(int.from_bytes(digest, "little"))
    draws = [generator.random() for _ in range(num_samples)]
    return sorted(range(num_samples), key=draws.__getitem__)
