"""Samples put together into rows of one length.

Best fit in decreasing order (Johnson, "Near-optimal bin packing algorithms", 1973; for training texts Ding et al.,
arXiv:2404.10830): the longest sample first, each into the fullest row that still has room for it. Samples are whole
numbers of tokens and many are of one length, so open rows are kept by the room they have: one step is a search among
the distinct rooms, whatever the number of rows. A million samples take about a second.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, in each row the longest first.

    Samples of one length are interchangeable: they are taken in the order in which they stand, and which row gets one
    of that length does not depend on them.

    Args:
        lengths: tokens of each sample, 1 to `capacity`.
        capacity: tokens of a row.

    Raises:
        ValueError: a length that is out of bounds.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and not 1 <= sizes.min() <= sizes.max() <= capacity:
        raise ValueError(f"samples of {sizes.min()} to {sizes.max()} tokens in rows of {capacity}")
    rows: list[list[int]] = []
    rooms: list[int] = []  # the distinct rooms of open rows, ascending
    with_room: dict[int, list[int]] = {}
    order = np.argsort(-sizes, kind="stable")
    for sample, length in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[row].append(sample)
        if left := room - length:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(row)
    return rows
