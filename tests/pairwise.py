"""Rows in which every two choices of different axes meet, unless they exclude each other."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


@dataclass(frozen=True)
class Conflict:
    """Choices that cannot go together.

    Attributes:
        name: of the reason.
        choices: by axis, those of it that take part; the conflict is there if a row has one of them on each axis.
    """

    name: str
    choices: Mapping[str, Collection[str]]

    def is_in(self, row: Row) -> bool:
        """Whether a row, of which choices may be missing, has it."""
        return all(row.get(axis) in choices for axis, choices in self.choices.items())


def pairs(row: Row) -> set[Pair]:
    return set(itertools.combinations(sorted(row.items()), 2))


def all_pairs(axes: Mapping[str, Sequence[str]]) -> set[Pair]:
    """Every two choices of different axes."""
    both = itertools.combinations(sorted(axes), 2)
    return {((a, x), (b, y)) for a, b in both for x, y in itertools.product(axes[a], axes[b])}


def is_possible(row: Row, axes: Mapping[str, Sequence[str]], conflicts: Sequence[Conflict]) -> bool:
    """Whether a row, of which choices may be missing, can be completed without a conflict."""
    if any(conflict.is_in(row) for conflict in conflicts):
        return False
    open_axes = [axis for conflict in conflicts for axis in conflict.choices if axis not in row]
    if not open_axes:
        return True
    return any(is_possible(row | {open_axes[0]: choice}, axes, conflicts) for choice in axes[open_axes[0]])


def covering(
    axes: Mapping[str, Sequence[str]], conflicts: Sequence[Conflict] = (), begun: Iterable[Row] = ()
) -> list[Row]:
    """Rows of a choice from each axis, the same ones every time.

    First each row that is begun is completed, then rows are added for what has not met in a row without a conflict. Of
    choices that exclude each other there is one row, which has a conflict.

    Args:
        axes: the choices of each.
        conflicts: what cannot go together.
        begun: rows of some axes that shall be there.
    """
    luck = random.Random(0)
    missing = all_pairs(axes)
    rows = []

    def add(start: Row) -> None:
        row = _completed(start, axes, conflicts, missing, luck)
        rows.append(row)
        if any(conflict.is_in(row) for conflict in conflicts):
            missing.difference_update(pairs(start))
        else:
            missing.difference_update(pairs(row))

    for row in begun:
        add(dict(row))
    for pair in sorted(missing):
        if pair in missing:
            add(dict(pair))
    return rows


def _completed(
    start: Row,
    axes: Mapping[str, Sequence[str]],
    conflicts: Sequence[Conflict],
    missing: set[Pair],
    luck: random.Random,
) -> Row:
    """The row with choices that bring most of what is missing and no conflict that was not there, where there are."""
    best: tuple[bool, int, Row] | None = None
    for _ in range(3):
        row, clean = dict(start), True
        for axis in luck.sample(sorted(axes), len(axes)):
            if axis in row:
                continue
            decided = [conflict for conflict in conflicts if axis in conflict.choices]  # of which the row has none yet
            tried = [row | {axis: choice} for choice in luck.sample(list(axes[axis]), len(axes[axis]))]
            free = [one for one in tried if not any(conflict.is_in(one) for conflict in decided)]
            clean = clean and bool(free)
            row = max(free or tried, key=lambda one: len(pairs(one) & missing))
        found = (clean, len(pairs(row) & missing), row)
        if best is None or found[:2] > best[:2]:
            best = found
    assert best is not None
    return dict(sorted(best[2].items()))
