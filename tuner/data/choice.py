"""Which examples are trained and validated on: decided in one pass that keeps 16 bytes of each and no text.

Examples with nothing to learn and duplicates go first, then a digest of each key decides the side of the split, so that
no key is on both sides and equal files give equal splits in every process; then `max_samples` and `max_val_samples`
choose by the same digest (a fixed random choice, not the head of the file). Where there are examples of their own to
validate on, what is among them is not trained on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tuner.errors import DataError

if TYPE_CHECKING:
    from tuner.data.dataset import Example

DIGEST_BYTES = 16
"""Of the sha256 of a key: a hundred million keys have an equal pair with a probability of 1.5e-23."""


@dataclass(frozen=True)
class Choice:
    """What becomes of each example of a pass, by its number in the pass.

    Attributes:
        train: bool [examples], whether it is trained on.
        rank: int64 [examples], its place among those validated on, -1 for the others.
    """

    train: NDArray[np.bool_]
    rank: NDArray[np.int64]

    @property
    def num_train(self) -> int:
        return int(self.train.sum())

    @property
    def num_validation(self) -> int:
        return int((self.rank >= 0).sum())


def digest_of(key: str) -> bytes:
    """What decides about examples of this key, in every process alike."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:DIGEST_BYTES]


def choose(
    name: str,
    sources: Sequence[Iterable[Example]],
    is_usable: Callable[[Example], bool],
    counts: Counter[str],
    *,
    val_fraction: float,
    max_samples: int | None,
    max_val_samples: int | None,
) -> Choice:
    """Pass over the examples once, those of one source behind those of the other, and decide.

    Args:
        name: of the data, for messages.
        sources: examples to train on, and perhaps those to validate on; else a share of the first.
        is_usable: whether there is something to learn from one.
        counts: gets `examples`, `empty`, `duplicates`, `validation_unused` and `train_unused`.
        val_fraction: share of the distinct examples that is set aside; at least one, and at least one is left.
        max_samples: trained on at most.
        max_val_samples: validated on at most.

    Raises:
        DataError: fewer than two different examples, or none to train on; or what reading them raises.
    """
    digests, usable, starts = _digests(sources, is_usable)
    numbers = np.flatnonzero(usable)  # in the pass
    to_validate = numbers >= (starts[1] if len(starts) > 1 else len(usable))
    ranked = _distinct_by_digest(digests, to_validate)
    counts.update(examples=len(usable), empty=int(len(usable) - usable.sum()), duplicates=len(digests) - len(ranked))
    if len(ranked) < 2:
        raise DataError(
            f"{name}: {len(ranked)} usable example{'' if len(ranked) == 1 else 's'} of {counts['examples']}"
            " read; it takes two different ones at least, one to train and one to validate on"
        )
    if len(starts) > 1:
        all_validation, all_train = numbers[ranked[to_validate[ranked]]], numbers[ranked[~to_validate[ranked]]]
    else:
        num_validation = min(max(1, round(val_fraction * len(ranked))), len(ranked) - 1)
        all_validation, all_train = np.split(numbers[ranked], [num_validation])
    if not (len(all_validation) and len(all_train)):
        side = "train on that is not validated on" if len(all_validation) else "validate on"
        raise DataError(f"{name}: no usable example to {side}, of {counts['examples']} read")
    validation, train = all_validation[:max_val_samples], all_train[:max_samples]
    counts["validation_unused"] = len(all_validation) - len(validation)
    counts["train_unused"] = len(all_train) - len(train)
    choice = Choice(np.zeros(len(usable), np.bool_), np.full(len(usable), -1, np.int64))
    choice.train[train] = True
    choice.rank[validation] = np.arange(len(validation))
    return choice


def _digests(
    sources: Sequence[Iterable[Example]], is_usable: Callable[[Example], bool]
) -> tuple[NDArray[Any], NDArray[np.bool_], list[int]]:
    """Digests of the usable examples [usable, 2], as halves; which of all are usable; where each source starts."""
    digests, usable, starts = bytearray(), bytearray(), []
    for source in sources:
        starts.append(len(usable))
        for example in source:
            if is_usable(example):
                digests += digest_of(example.key)
                usable.append(1)
            else:
                usable.append(0)
    halves = np.frombuffer(bytes(digests), dtype=">u8").reshape(-1, 2).astype(np.uint64)
    return halves, np.frombuffer(bytes(usable), dtype=np.bool_), starts


def _distinct_by_digest(digests: NDArray[Any], to_validate: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows of `digests` in their order as numbers, of equal ones the first to validate on, or else the first, alone."""
    order = np.lexsort((~to_validate, digests[:, 1], digests[:, 0]))  # stable: of equal rows the first stays the first
    ordered = digests[order]
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order[is_first]
