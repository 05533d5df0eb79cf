"""In which order, and put together how, the samples of an epoch are trained on.

An order hands out rows of indices of samples. It is a function of the samples' lengths, the seed, the epoch and the
data's fingerprint, computed at once for an epoch and the same in every process.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from tuner.data.packing import best_fit

Rows = Sequence[Sequence[int]]

MEGABATCH = 50
"""Windows that are sorted by length together where samples are grouped.

In windows of 8 samples of `pydoc` 27 % are padding as they are drawn; with 10, 20, 50 and 200 windows sorted together
it is 7, 4, 2 and 1 %."""


class Order(ABC):
    """The rows of each epoch.

    Args:
        lengths: tokens of each sample, at least one sample.
        seed: with `fingerprint` and the epoch, decides the order.
        fingerprint: `Dataset.fingerprint`.

    Attributes: those of `tuner.types.EpochOrder`.
    """

    name: ClassVar[str]
    packed = False

    def __init__(self, lengths: Sequence[int], *, seed: int, fingerprint: str) -> None:
        if not len(lengths):
            raise ValueError("no samples to make batches of")
        self.fingerprint = fingerprint
        self.num_rows = len(lengths)
        self._lengths = np.asarray(lengths)
        self._seed = seed
        self._last: tuple[int, Rows] | None = None

    def rows(self, epoch: int) -> Rows:
        """The rows of an epoch, each sample in exactly one."""
        if self._last is None or self._last[0] != epoch:
            shuffled = epoch_order(len(self._lengths), self._seed, epoch, self.fingerprint)
            self._last = (epoch, self._arranged(shuffled, epoch))
        return self._last[1]

    def described(self) -> Mapping[str, Any]:
        return {"packing": self.name}

    @abstractmethod
    def _arranged(self, shuffled: list[int], epoch: int) -> Rows:
        """The rows of `epoch`, whose samples are shuffled so."""


class Shuffled(Order):
    """One sample a row, in random order."""

    name = "none"

    def _arranged(self, shuffled: list[int], epoch: int) -> Rows:
        return [(sample,) for sample in shuffled]


class Grouped(Order):
    """One sample a row; samples of about one length stand in one window, windows in random order.

    Args:
        window: rows that are trained on in one step.
    """

    name = "group"

    def __init__(self, lengths: Sequence[int], *, seed: int, fingerprint: str, window: int) -> None:
        super().__init__(lengths, seed=seed, fingerprint=fingerprint)
        self._window = window

    def _arranged(self, shuffled: list[int], epoch: int) -> Rows:
        mega = MEGABATCH * self._window
        windows: list[list[int]] = []
        for start in range(0, len(shuffled), mega):
            by_length = sorted(shuffled[start : start + mega], key=lambda sample: -self._lengths[sample])
            windows += [by_length[i : i + self._window] for i in range(0, len(by_length), self._window)]
        whole = len(shuffled) // self._window  # one that is smaller stays the last
        order = epoch_order(whole, self._seed, epoch, f"{self.fingerprint}/windows")
        return [(sample,) for index in [*order, *range(whole, len(windows))] for sample in windows[index]]


class Packed(Order):
    """Several samples a row, by best fit.

    How many rows there are and the lengths in each follow from the lengths of the samples alone and stay the same in
    every epoch; which of the samples of one length goes where, and the order of the rows, is drawn anew.

    Args:
        row_tokens: tokens of a row at most; no sample is longer.
    """

    name = "pack"
    packed = True

    def __init__(self, lengths: Sequence[int], *, seed: int, fingerprint: str, row_tokens: int) -> None:
        super().__init__(lengths, seed=seed, fingerprint=fingerprint)
        self.row_tokens = row_tokens
        rows = best_fit(lengths, row_tokens)
        self.num_rows = len(rows)
        self.efficiency = float(self._lengths.sum()) / (self.num_rows * row_tokens)
        """Share of the tokens of all rows that are no padding."""
        rank = np.empty(len(lengths), dtype=np.int64)
        rank[np.argsort(-self._lengths, kind="stable")] = np.arange(len(lengths))
        self._ends = np.cumsum([len(row) for row in rows])
        self._ranks = rank[np.concatenate(rows)]
        """Place by place, row by row: the how-manieth longest sample stands there."""

    def described(self) -> Mapping[str, Any]:
        shape = {"rows": self.num_rows, "row_tokens": self.row_tokens}
        return {**super().described(), **shape, "efficiency": round(self.efficiency, 4)}

    def _arranged(self, shuffled: list[int], epoch: int) -> Rows:
        order = np.asarray(shuffled)
        by_length = order[np.argsort(-self._lengths[order], kind="stable")]
        rows = np.split(by_length[self._ranks], self._ends[:-1])
        drawn = epoch_order(self.num_rows, self._seed, epoch, f"{self.fingerprint}/rows")
        return [rows[index].tolist() for index in drawn]


def epoch_order(num_samples: int, seed: int, epoch: int, fingerprint: str) -> list[int]:
    """A permutation of `range(num_samples)` that is a function of the arguments alone.

    Sorts by draws of `random.Random.random`, the one method whose sequence Python promises never to change.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{fingerprint}".encode()).digest()
    generator = random.Random(int.from_bytes(digest, "little"))
    draws = [generator.random() for _ in range(num_samples)]
    return sorted(range(num_samples), key=draws.__getitem__)
