"""Streaming: what is read once is what would be prepared, in an order that can be continued at any sample."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tuner.data.choice import digest_of
from tuner.data.dataset import Example, Preparation
from tuner.data.streamed_batches import StreamedBatches
from tuner.data.streaming import is_set_aside
from tuner.errors import CheckpointError, DataError
from tuner.tokenizers.huggingface import HuggingFaceTokenizer
from tuner.tokenizers.packaged import write_packaged_tokenizer
from tuner.types import Dataset, StreamPosition

KEYS: dict[str, Any] = {
    "val_fraction": 0.2,
    "max_seq_len": 64,
    "too_long": "truncate",
    "max_samples": None,
    "max_val_samples": None,
    "train_on": "response",
    "cache": False,
    "cache_dir": None,
    "workers": 1,
    "streaming": True,
    "packing": "none",
    "pack_len": None,
    "shuffle_buffer": 30,
}


@dataclass(frozen=True)
class Given(Preparation):
    """Data that a test makes: the rows of the last `load`."""

    sources: ClassVar[tuple[Any, Any]]

    def examples(self) -> Any:
        return self.sources[0]

    def validation_examples(self) -> Any:
        return self.sources[1]


class Listed(list[Example]):
    name = "given"
    bad_rows = ()

    def content_digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


def chat(number: int, question: str = "") -> Example:
    messages: Any = [
        {"role": "user", "content": question or f"question {number}"},
        {"role": "assistant", "content": f"answer {number}"},
    ]
    return Example(messages, key=str(number), origin=f"given:{number}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    folder = tmp_path_factory.mktemp("smollm2")
    write_packaged_tokenizer("smollm2", folder)
    return HuggingFaceTokenizer(folder)


CHATS = Listed(chat(number) for number in [*range(300), *range(50)])


def load(tokenizer: Any, given: Listed = CHATS, to_validate: Listed | None = None, **keys: Any) -> Dataset:
    Given.sources = given, to_validate
    return Given(**{**KEYS, **keys}).load(tokenizer)


def batches(data: Dataset, *, seed: int = 0, size: int = 2, accumulation: int = 3) -> StreamedBatches:
    assert data.stream is not None
    return StreamedBatches(data.stream, batch_size=size, accumulation=accumulation, pad_id=0, seed=seed)


def rows(windows: Any) -> list[list[list[int]]]:
    """The token ids of every row of every window, in order; zeros are padding."""
    return [[row.tolist() for batch in window for row in batch.tokens] for window in windows]


def epoch_of(given: StreamedBatches) -> list[Any]:
    windows = [next(given)]
    while not given.at_epoch_end:
        windows.append(next(given))
    return windows


def words(data: Dataset, tokenizer: HuggingFaceTokenizer, seed: int = 0, epoch: int = 0) -> list[str]:
    """The replies in the order of an epoch."""
    assert data.stream is not None
    samples = [drawn.sample for drawn in data.stream.samples(seed, StreamPosition(epoch))]
    return [tokenizer.decode([i for i in sample.labels if i >= 0]).removesuffix("<|im_end|>") for sample in samples]


def test_an_epoch_has_every_distinct_row_once_that_is_not_set_aside(tokenizer: HuggingFaceTokenizer) -> None:
    data = load(tokenizer)
    set_aside = {i for i in range(300) if is_set_aside(digest_of(str(i)), 0.2)}
    assert 30 < len(set_aside) < 90
    assert Counter(words(data, tokenizer)) == Counter(f"answer {i}" for i in range(300) if i not in set_aside)
    assert len(data.validation) == len(set_aside)
    assert data.stream is not None
    assert data.stream.counts["examples"] == 350
    assert data.stream.counts["duplicates"] == len(set(range(50)) - set_aside)
    few = load(tokenizer, max_val_samples=7)
    assert few.validation == data.validation[:7]
    assert sorted(words(few, tokenizer)) == sorted(words(data, tokenizer))


def test_every_sample_is_what_would_be_prepared(tokenizer: HuggingFaceTokenizer) -> None:
    streamed, prepared = load(tokenizer), load(tokenizer, streaming=False)
    everything = {tuple(sample.tokens): sample for sample in [*prepared.train, *prepared.validation]}
    assert streamed.stream is not None
    for drawn in streamed.stream.samples(0, StreamPosition()):
        assert drawn.sample == everything[tuple(drawn.sample.tokens)]


def test_the_order_depends_on_seed_epoch_and_content_alone(tokenizer: HuggingFaceTokenizer) -> None:
    data = load(tokenizer)
    first = words(data, tokenizer)
    assert words(load(tokenizer, workers=2, cache=True), tokenizer) == first
    others = [
        words(data, tokenizer, seed=1),
        words(data, tokenizer, epoch=1),
        words(load(tokenizer, shuffle_buffer=31), tokenizer),
    ]
    for other in others:
        assert other != first
        assert sorted(other) == sorted(first)
    assert len({tuple(order) for order in others}) == 3


def test_rows_are_drawn_from_the_buffer_alone(tokenizer: HuggingFaceTokenizer) -> None:
    def places(shuffle_buffer: int) -> list[int]:
        order = words(load(tokenizer, shuffle_buffer=shuffle_buffer), tokenizer)
        numbers = [int(word.split()[1]) for word in order]
        rank = {number: place for place, number in enumerate(sorted(numbers))}
        return [rank[number] for number in numbers]

    assert places(1) == list(range(len(places(1))))
    for shuffle_buffer in (10, 100):
        ahead = [number - place for place, number in enumerate(places(shuffle_buffer))]
        assert max(ahead) < shuffle_buffer
        assert max(ahead) > shuffle_buffer // 2
    assert places(1000) != sorted(places(1000))


@pytest.mark.parametrize("steps", [0, 1, 5, 40, 47, 99])
def test_any_position_continues_equally(steps: int, tokenizer: HuggingFaceTokenizer) -> None:
    whole = batches(load(tokenizer))
    list(islice(whole, steps))
    state = whole.state_dict()
    resumed = batches(load(tokenizer))
    resumed.load_state_dict(state)
    assert resumed.at_epoch_end == whole.at_epoch_end
    assert rows(islice(resumed, 60)) == rows(islice(whole, 60))
    assert resumed.state_dict() == whole.state_dict()


def test_what_was_seen_is_read_and_not_tokenized(tokenizer: HuggingFaceTokenizer) -> None:
    class Counting(HuggingFaceTokenizer):
        encoded = 0

        def encode_chats(self, conversations: Any, **keys: Any) -> Any:
            Counting.encoded += len(conversations)
            return super().encode_chats(conversations, **keys)

    data = load(Counting(tokenizer.folder))
    Counting.encoded = 0
    assert data.stream is not None
    left = list(data.stream.samples(0, StreamPosition(0, 200)))
    assert Counting.encoded == len(left) == len(words(load(tokenizer), tokenizer)) - 200


def test_epochs_end_with_their_last_sample(tokenizer: HuggingFaceTokenizer) -> None:
    given = batches(load(tokenizer))
    first, second = epoch_of(given), epoch_of(given)
    assert given.position == StreamPosition(2)
    for epoch in (first, second):
        sizes = [len(window) for window in rows(epoch)]
        assert sizes[:-1] == [6] * (len(sizes) - 1)
        assert 1 <= sizes[-1] <= 6
    padded = [sorted(tuple(filter(None, row)) for window in rows(epoch) for row in window) for epoch in (first, second)]
    assert padded[0] == padded[1]


def test_long_and_empty_rows_are_counted_and_positions_stay_true(tokenizer: HuggingFaceTokenizer) -> None:
    given = Listed(chat(i, "long " * 80 if i % 5 == 0 else "") for i in range(100))
    data = load(tokenizer, given)
    dropped = load(tokenizer, given, too_long="drop")
    replies = words(data, tokenizer)
    assert sorted(replies) == sorted(words(dropped, tokenizer))
    assert all(int(word.split()[1]) % 5 for word in replies)
    assert data.stream is not None
    assert dropped.stream is not None
    assert data.stream.counts["nothing_trained"] == dropped.stream.counts["dropped"] > 5
    whole = batches(data)
    ahead = rows(islice(whole, 12))
    for steps in range(10):
        first, second = batches(data), batches(data)
        list(islice(first, steps))
        second.load_state_dict(first.state_dict())
        assert rows(islice(second, 2)) == ahead[steps : steps + 2]
    with pytest.raises(DataError, match=r"given:\d+: \d+ tokens, more than data\.max_seq_len=64"):
        words(load(tokenizer, Listed([*CHATS, *given][::-1]), too_long="refuse"), tokenizer)


def test_pieces_of_texts_continue_within_a_text(tokenizer: HuggingFaceTokenizer) -> None:
    texts = [" ".join(f"w{number}x{k}" for k in range(number * 7 % 60 + 10)) for number in range(40)]
    given = Listed(Example([], key=text, origin="here:1", text=text, chunk=True) for text in texts)
    data = load(tokenizer, given, max_seq_len=50)
    whole = rows(epoch_of(batches(data)))
    assert data.stream is not None
    assert any(drawn.after.piece for drawn in data.stream.samples(0, StreamPosition()))
    for steps in range(1, len(whole)):
        first, second = batches(data), batches(data)
        list(islice(first, steps))
        second.load_state_dict(first.state_dict())
        assert rows([next(second)]) == [whole[steps]]


def test_a_batch_knows_where_in_the_epoch_its_samples_are(tokenizer: HuggingFaceTokenizer) -> None:
    texts = [" ".join(f"w{number}x{k}" for k in range(number * 7 % 60 + 10)) for number in range(40)]
    in_pieces = Listed(Example([], key=text, origin="here:1", text=text, chunk=True) for text in texts)
    for data in (load(tokenizer), load(tokenizer, in_pieces, max_seq_len=50)):
        assert data.stream is not None
        given = batches(data, seed=3)
        for epoch in range(2):
            of_example: dict[int, list[list[int]]] = {}
            for drawn in data.stream.samples(3, StreamPosition(epoch)):
                of_example.setdefault(drawn.number, []).append(list(drawn.sample.tokens))
            found: dict[int, list[list[int]]] = {}
            for window in epoch_of(given):
                for batch in window:
                    for number, row in zip(batch.sample_ids, batch.tokens.tolist(), strict=True):
                        found.setdefault(number, []).append([token for token in row if token])
            assert {number: sorted(rows) for number, rows in found.items()} == {
                number: sorted(rows) for number, rows in of_example.items()
            }
            for number in list(of_example)[::40]:  # where a message's number leads
                first = next(iter(data.stream.samples(3, StreamPosition(epoch, number))))
                assert list(first.sample.tokens) == of_example[number][0]


def test_validation_examples_of_their_own(tokenizer: HuggingFaceTokenizer) -> None:
    data = load(tokenizer, to_validate=Listed(chat(number) for number in [290, 290, 500]))
    assert len(data.validation) == 2
    assert sorted(words(data, tokenizer)) == sorted(f"answer {i}" for i in range(300) if i != 290)


def test_other_data_is_refused_and_none_is_an_error(tokenizer: HuggingFaceTokenizer) -> None:
    state = batches(load(tokenizer)).state_dict()
    with pytest.raises(CheckpointError, match="the data is not what this run began with"):
        batches(load(tokenizer, Listed(CHATS[1:]))).load_state_dict(state)
    with pytest.raises(DataError, match=r"none of 0 examples in the first 100,000 .* say data\.val_path=FILE"):
        load(tokenizer, val_fraction=1e-6)
    aside = next(i for i in range(300) if is_set_aside(digest_of(str(i)), 0.2))
    with pytest.raises(DataError, match=r"data\.streaming: there is no sample to train on"):
        next(batches(load(tokenizer, Listed([chat(aside)]))))


def test_a_row_that_cannot_be_read_stops_where_it_is(tokenizer: HuggingFaceTokenizer, tmp_path: Path) -> None:
    class Breaking(Listed):
        def __iter__(self) -> Any:
            yield from islice(super().__iter__(), 200)
            raise DataError("given:201: not valid JSON")

    data = load(tokenizer, Breaking(CHATS), max_val_samples=3)
    with pytest.raises(DataError, match="given:201: not valid JSON"):
        epoch_of(batches(data))
