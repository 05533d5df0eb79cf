"""Best fit: rows hold whole samples, and each sample goes where best fit in decreasing order puts it."""

from __future__ import annotations

import random
import time

import pytest

from tuner.data.packing import best_fit


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Said once more, with a search through all rows for each sample: the lengths in each row.

    Of rows with equal room any may be taken; how full rows end does not depend on which.
    """
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@pytest.mark.parametrize(("capacity", "number"), [(1, 5), (7, 60), (64, 300), (1000, 400)])
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_those_of_a_search_through_all_rows(capacity: int, number: int, seed: int) -> None:
    draws = random.Random(seed)
    lengths = [1 + int(draws.random() ** 2 * capacity) for _ in range(number)]
    rows = best_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(number))
    found = [sum(lengths[i] for i in row) for row in rows]
    assert max(found) <= capacity
    assert sorted(found) == sorted(map(sum, slow_best_fit(lengths, capacity)))


def test_a_known_packing() -> None:
    assert best_fit([4, 8, 1, 4, 2, 1], 10) == [[1, 2, 5], [0, 3, 4]]
    assert best_fit([10, 10], 10) == [[0], [1]]
    assert best_fit([], 10) == []


def test_samples_of_one_length_change_places_and_nothing_else() -> None:
    lengths = [5, 3, 5, 3, 2, 7, 2]
    swapped = [2, 1, 0, 3, 4, 5, 6]  # samples 0 and 2, both of 5 tokens
    rows, other = best_fit(lengths, 10), best_fit([lengths[i] for i in swapped], 10)
    assert [[lengths[i] for i in row] for row in rows] == [[lengths[swapped[i]] for i in row] for row in other]


@pytest.mark.parametrize("lengths", [[0, 3], [11, 3], [-1]])
def test_a_sample_that_no_row_can_hold_is_an_error(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="in rows of 10"):
        best_fit(lengths, 10)


def test_time_grows_as_the_number_of_samples() -> None:
    """A search through all rows would take hours for a million samples; this is 50,000 of them, of all lengths."""
    draws = random.Random(0)
    lengths = [1 + int(draws.random() * 4096) for _ in range(50_000)]
    started = time.process_time()
    rows = best_fit(lengths, 4096)
    assert time.process_time() - started < 1.0  # 0.05 s on an idle machine
    assert sum(lengths) / (4096 * len(rows)) > 0.98
