"""Padding, and the order in which samples are trained on."""

from __future__ import annotations

import subprocess
import sys
from array import array
from collections import Counter
from dataclasses import asdict
from itertools import islice

import pytest
import torch

from tuner.data.batches import Batches, Position, batches_by_length, collate, epoch_order
from tuner.types import IGNORE, Batch, Sample

PAD = 99


def _sample(number: int, length: int) -> Sample:
    """`length` tokens, all equal to `number`, of which the first is not trained on."""
    return Sample(array("i", [number] * length), array("i", [IGNORE] + [number] * (length - 1)))


SAMPLES = [_sample(number, 2 + number * 7 % 11) for number in range(23)]


def _batches(samples: list[Sample] = SAMPLES, *, seed: int = 0, fingerprint: str = "f", window: int = 6) -> Batches:
    assert window % 2 == 0
    return Batches(samples, batch_size=2, accumulation=window // 2, pad_id=PAD, seed=seed, fingerprint=fingerprint)


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


def test_order_depends_on_nothing_else() -> None:
    code = "from tuner.data.batches import epoch_order; import torch; torch.rand(3); print(epoch_order(40, 3, 1, 'f'))"
    environment = {"PYTHONHASHSEED": "1"}
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
    large = Batches(SAMPLES, batch_size=6, accumulation=1, pad_id=PAD, seed=0, fingerprint="f")
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
