"""The largest batch, or the longest sequence, that fits: with few questions, since each takes two traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

HALVING = 8
"""Sizes that were tried, after which the search goes on by halves: a line that is flat and then steep misleads it."""


def largest(total_of: Callable[[int], int], available: int, start: int, step: int, limit: int) -> int | None:
    """The largest size of which not more than `available` is alive, None where that is so of no size.

    What is alive grows with the size in a straight line or one that bends upwards (attention whose scores are kept).
    So where the line through two sizes that fit meets what is available, nothing larger fits, and where the line
    through one that fits and one that does not meets it, that one does.

    Args:
        total_of: bytes of a size.
        available: bytes.
        start: the size to begin with.
        step: other sizes are its multiples, none smaller.
        limit: none is larger.
    """
    fitting: dict[int, int] = {}
    too_large: dict[int, int] = {}
    size = start
    while True:
        total = total_of(size)
        (fitting if total <= available else too_large)[size] = total
        low, high = max(fitting, default=0), min(too_large, default=limit + step)
        first, last = (low // step + 1) * step, (high - 1) // step * step
        if last < first or crossing(fitting, sorted(fitting)[-2:], available) < first:
            return low or None
        if len(fitting) + len(too_large) > HALVING:
            guess = (first + last) / 2
        else:
            guess = guessed(fitting, too_large, available, size)
        size = int(min(max(min(guess, last) // step * step, first), last))


def guessed(fitting: Mapping[int, int], too_large: Mapping[int, int], available: int, size: int) -> float:
    """Where what is alive may be what is available, after sizes of which the last was `size`."""
    known = {**fitting, **too_large}
    if len(known) == 1:
        return size * (2.0 if fitting else 0.5)
    if not fitting:
        meets = crossing(known, sorted(too_large)[:2], available)
        return meets if meets < math.inf else 0.0
    at_most = crossing(known, sorted(fitting)[-2:], available)
    if not too_large:
        return at_most
    at_least = crossing(known, [max(fitting), min(too_large)], available)
    return at_least if at_most == math.inf else (at_least + min(at_most, min(too_large))) / 2


def crossing(known: Mapping[int, int], sizes: Sequence[int], available: int) -> float:
    """Where the line through two sizes meets `available`; infinite where it does not, or where there are not two."""
    if len(sizes) < 2 or known[sizes[1]] == known[sizes[0]]:
        return math.inf
    first, second = sizes
    return first + (available - known[first]) * (second - first) / (known[second] - known[first])
