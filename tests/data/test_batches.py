"""Padding, and the order in which samples are trained on."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from collections import Counter
from dataclasses import asdict
from itertools import groupby, islice, pairwise

import pytest
import torch

from tuner.data.batches import Batches, Position, batches_by_length, collate, collate_packed, share
from tuner.data.order import Grouped, Order, Packed, Shuffled, epoch_order
from tuner.types import IGNORE, Batch, Sample

PAD = 99


def _sample(number: int, length: int) -> Sample:
    """`length` tokens, all equal to `number`, of which the first is not trained on."""
    return Sample(array("i", [number] * length), array("i", [IGNORE] + [number] * (length - 1)))


SAMPLES = [_sample(number, 2 + number * 7 % 11) for number in range(23)]


def _batches(samples: list[Sample] = SAMPLES, *, seed: int = 0, fingerprint: str = "f", window: int = 6) -> Batches:
    assert window % 2 == 0
    order = _shuffled(samples, seed=seed, fingerprint=fingerprint)
    return Batches(samples, order, batch_size=2, accumulation=window // 2, pad_id=PAD)


def _shuffled(samples: list[Sample], *, seed: int = 0, fingerprint: str = "f") -> Shuffled:
    return Shuffled([len(sample.tokens) for sample in samples], seed=seed, fingerprint=fingerprint)


def _numbers(windows: list[list[Batch]]) -> list[list[list[int]]]:
    """The samples of every micro-batch by the number they repeat."""
    return [[batch.tokens[:, 0].tolist() for batch in window] for window in windows]


def test_collate_pads_on_the_right_and_ignores_padding() -> None:
    batch = collate([Sample([1, 2, 3], [IGNORE, 2, 3]), Sample(array("i", [4]), array("i", [4])), _sample(5, 2)], PAD)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.tokens.tolist() == [[1, 2, 3], [4, PAD, PAD], [5, 5, PAD]]
    assert batch.labels.tolist() == [[IGNORE, 2, 3], [4, IGNORE, IGNORE], [IGNORE, 5, IGNORE]]
    assert batch.num_trained == 3  # the label at the first position has no prediction


def test_padding_with_the_end_token_is_not_trained_on() -> None:
    assert collate([_sample(PAD, 3), _sample(PAD, 2)], PAD).num_trained == 3


@pytest.mark.parametrize("window", [2, 6, 22, 24, 100])
def test_every_sample_occurs_once_per_epoch_and_none_is_left_out(window: int) -> None:
    batches = _batches(window=window)
    for epoch in range(3):
        assert batches.position == Position(epoch, 0)
        seen: Counter[int] = Counter()
        for step in range(batches.steps_per_epoch):
            micro_batches = next(batches)
            rows = [row for batch in micro_batches for row in batch.tokens[:, 0].tolist()]
            last = step == batches.steps_per_epoch - 1
            assert len(rows) == (len(SAMPLES) - step * window if last else window)
            assert all(batch.tokens.shape[0] == 2 for batch in micro_batches[:-1])
            seen.update(rows)
        assert seen == Counter(range(len(SAMPLES)))


def test_window_is_sorted_by_length_and_its_micro_batches_hold_whole_samples() -> None:
    for window in islice(_batches(), 8):
        widths = [batch.tokens.shape[1] for batch in window]
        assert widths == sorted(widths, reverse=True)
        for batch in window:
            for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
                sample = SAMPLES[int(tokens[0])]
                rest = batch.tokens.shape[1] - len(sample.tokens)
                assert tokens.tolist() == [*sample.tokens, *[PAD] * rest]
                assert labels.tolist() == [*sample.labels, *[IGNORE] * rest]


def test_order_depends_on_seed_epoch_and_fingerprint() -> None:
    orders = [
        tuple(epoch_order(50, seed, epoch, fingerprint))
        for seed in (0, 1)
        for epoch in (0, 1)
        for fingerprint in ("f", "g")
    ]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == list(range(50)) for order in orders)


@pytest.mark.slow
def test_order_depends_on_nothing_else() -> None:
    code = "from tuner.data.order import epoch_order; import torch; torch.rand(3); print(epoch_order(40, 3, 1, 'f'))"
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": os.environ["PYTHONPATH"]}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout == f"{epoch_order(40, 3, 1, 'f')}\n"


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 11])
def test_restored_position_continues_equally(steps: int) -> None:
    first = _batches()
    list(islice(first, steps))
    position = Position(**asdict(first.position))
    second = _batches()
    second.position = position
    assert _numbers(list(islice(first, 9))) == _numbers(list(islice(second, 9)))
    assert first.position == second.position


def test_accumulation_does_not_change_which_samples_a_step_sees() -> None:
    small = _batches(window=6)
    large = Batches(SAMPLES, _shuffled(SAMPLES), batch_size=6, accumulation=1, pad_id=PAD)
    for _ in range(9):
        rows = [row for micro_batch in _numbers([next(small)])[0] for row in micro_batch]
        assert rows == _numbers([next(large)])[0][0]


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        _batches([])


def test_batches_by_length_hold_every_sample_once() -> None:
    batches = batches_by_length(SAMPLES, 4, PAD)
    rows = [row for batch in batches for row in batch.tokens[:, 0].tolist()]
    assert sorted(rows) == list(range(len(SAMPLES)))
    assert sum(batch.num_trained for batch in batches) == sum(len(sample.tokens) - 1 for sample in SAMPLES)
    shuffled_padding = sum(collate(SAMPLES[i : i + 4], PAD).tokens.numel() for i in range(0, len(SAMPLES), 4))
    assert sum(batch.tokens.numel() for batch in batches) < shuffled_padding


def _order(packing: str, samples: list[Sample] = SAMPLES, seed: int = 0, fingerprint: str = "f") -> Order:
    lengths = [len(sample.tokens) for sample in samples]
    if packing == "pack":
        return Packed(lengths, seed=seed, fingerprint=fingerprint, row_tokens=15)
    if packing == "group":
        return Grouped(lengths, seed=seed, fingerprint=fingerprint, window=4)
    return Shuffled(lengths, seed=seed, fingerprint=fingerprint)


packings = pytest.mark.parametrize("packing", ["none", "group", "pack"])


@packings
def test_each_sample_is_in_one_row_of_every_epoch(packing: str) -> None:
    order = _order(packing)
    for epoch in range(4):
        rows = order.rows(epoch)
        assert len(rows) == order.num_rows
        assert sorted(sample for row in rows for sample in row) == list(range(len(SAMPLES)))


@packings
def test_rows_depend_on_seed_epoch_and_fingerprint_and_nothing_else(packing: str) -> None:
    def all_rows(order: Order, epoch: int) -> str:
        return str([list(row) for row in order.rows(epoch)])

    drawn = {
        all_rows(_order(packing, seed=seed, fingerprint=fingerprint), epoch)
        for seed in (0, 1)
        for epoch in (0, 1)
        for fingerprint in ("f", "g")
    }
    assert len(drawn) == 8
    again = _order(packing)
    later = all_rows(again, 1), all_rows(again, 0)  # whatever was asked for before
    assert later == (all_rows(_order(packing), 1), all_rows(_order(packing), 0))


def test_groups_are_of_about_one_length_and_in_random_order() -> None:
    samples = [_sample(number, 2 + number * 37 % 101) for number in range(1003)]
    rows = _order("group", samples).rows(0)
    windows = [[len(samples[i].tokens) for (i,) in rows[start : start + 4]] for start in range(0, 1003, 4)]
    assert [len(window) for window in windows] == [4] * 250 + [3]
    assert sum(max(window) - min(window) for window in windows) / len(windows) < 3
    first = [window[0] for window in windows]
    assert sum(a < b for a, b in pairwise(first)) > 100  # as often longer than the one before as shorter


def test_packed_rows_are_full_and_their_shapes_those_of_every_epoch() -> None:
    order = _order("pack")
    assert isinstance(order, Packed)
    shapes = []
    for epoch in range(3):
        lengths = [[len(SAMPLES[i].tokens) for i in row] for row in order.rows(epoch)]
        assert all(sum(row) <= 15 for row in lengths)
        shapes.append(Counter(tuple(row) for row in lengths))
    assert shapes[0] == shapes[1] == shapes[2]
    assert order.efficiency == sum(len(sample.tokens) for sample in SAMPLES) / (15 * order.num_rows) > 0.9
    assert order.described()["rows"] == order.num_rows


def test_packed_batches_hold_whole_samples_with_their_documents() -> None:
    samples = [Sample([1, 2, 3], [1, 2, 3]), Sample([4], [4]), Sample([5, 6], [IGNORE, 6]), Sample([7], [7])]
    batch = collate_packed([samples[:2], samples[2:3], [samples[3], samples[0]]], PAD)
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [5, 6, PAD, PAD], [7, 1, 2, 3]]
    # a first token is nobody's target
    assert batch.labels.tolist() == [[IGNORE, 2, 3, IGNORE], [IGNORE, 6, IGNORE, IGNORE], [IGNORE, IGNORE, 2, 3]]
    assert batch.documents == ((3, 1), (2,), (1, 3))
    assert (batch.num_tokens, batch.num_trained) == (10, 5)
    assert batch.num_trained == collate(samples, PAD).num_trained + 2  # one sample stands there twice
    assert batch.to(torch.device("cpu")).documents == batch.documents


@packings
def test_a_batch_knows_which_samples_it_is_made_of(packing: str) -> None:
    batches = Batches(SAMPLES, _order(packing), batch_size=2, accumulation=3, pad_id=PAD, rank=1, world=2)
    seen: Counter[int] = Counter()
    for window in islice(batches, 2 * batches.steps_per_epoch):
        for batch in window:
            repeated = [number for row in batch.tokens.tolist() for number, _ in groupby(row) if number != PAD]
            assert list(batch.sample_ids) == repeated
            assert batch.to(torch.device("meta")).sample_ids == batch.sample_ids
            seen.update(batch.sample_ids)
    assert len(seen) > len(SAMPLES) // 2


def test_samples_that_come_without_numbers_are_numbered_as_they_stand() -> None:
    for ids, expected in ((None, range(len(SAMPLES))), (range(100, 100 + len(SAMPLES)), range(100, 123))):
        for batch in batches_by_length(SAMPLES, 4, PAD, ids):
            assert batch.sample_ids == tuple(expected[row[0]] for row in batch.tokens.tolist())


@packings
@pytest.mark.parametrize("world", [1, 2, 3, 8, 40])
def test_processes_share_every_window_and_see_each_sample_once_per_epoch(packing: str, world: int) -> None:
    ranks = [
        Batches(SAMPLES, _order(packing), batch_size=2, accumulation=2, pad_id=PAD, rank=rank, world=world)
        for rank in range(world)
    ]
    order = _order(packing)
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for step in range(ranks[0].steps_per_epoch):
            shares = [next(rank) for rank in ranks]
            window = [int(n) for batches in shares for batch in batches for n in batch.tokens.unique() if n != PAD]
            expected = order.rows(epoch)[step * 4 * world : (step + 1) * 4 * world]
            assert sorted(window) == sorted(sample for row in expected for sample in row)
            rows = [sum(batch.tokens.shape[0] for batch in batches) for batches in shares]
            assert max(rows) - min(rows) <= 1
            assert max(rows) <= 4
            seen.update(window)
        assert seen == Counter(range(len(SAMPLES)))
        assert all(rank.position == Position(epoch + 1, 0) for rank in ranks)


@pytest.mark.parametrize(("entries", "world"), [(0, 3), (1, 4), (7, 1), (8, 4), (9, 4), (100, 7)])
def test_shares_are_the_window(entries: int, world: int) -> None:
    window = [3 * i + 1 for i in range(entries)]
    shares = [share(window, rank, world) for rank in range(world)]
    assert sorted(entry for one in shares for entry in one) == window
    assert {len(one) for one in shares} <= {entries // world, -(-entries // world)}
    assert all(list(one) == sorted(one) for one in shares)  # longest first stays longest first


@packings
@pytest.mark.parametrize("steps", [0, 1, 3, 5, 11])
def test_a_position_among_rows_continues_equally(packing: str, steps: int) -> None:
    def fresh() -> Batches:
        return Batches(SAMPLES, _order(packing), batch_size=2, accumulation=1, pad_id=PAD)

    first, second = fresh(), fresh()
    list(islice(first, steps))
    second.load_state_dict(first.state_dict())
    for ours, theirs in islice(zip(first, second, strict=True), 9):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.tokens, other.tokens)
            assert torch.equal(one.labels, other.labels)
            assert one.documents == other.documents
    assert first.position == second.position
