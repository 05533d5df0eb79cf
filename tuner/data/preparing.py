"""Examples of a source into the flat files of an entry, in two passes and in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tuner.data.cache import write_description
from tuner.data.choice import Choice, choose
from tuner.data.encoding import Encoded, Encoder, TrainOn
from tuner.data.samples import SIDES, SampleWriter, fingerprint_of_files
from tuner.data.workers import encoded_chunks, number_of_processes
from tuner.errors import DataError
from tuner.types import Dialogue, Message, Tokenizer

if TYPE_CHECKING:
    from tuner.data.dataset import Example, Examples, Preparation

NUM_DIALOGUES = 8
"""Validation examples that are kept as text too."""

CHUNK = 512
"""Examples encoded at once: what the encoder says of each takes far more room than its ids."""


def prepare(settings: Preparation, sources: Sequence[Examples], tokenizer: Tokenizer, folder: Path) -> None:
    """Read, split, tokenize and write.

    Args:
        settings: the keys.
        sources: passed over twice: what is trained on, and perhaps what is validated on.
        tokenizer: the model's own.
        folder: empty.

    Raises:
        DataError: naming file and line of what cannot be read; too few examples, one that is too long where that is
            refused, or nothing is left.
    """
    counts: Counter[str] = Counter()
    name, before = sources[0].name, [source.content_digest() for source in sources]
    choice = choose(
        name,
        sources,
        lambda example: is_usable(example, settings.train_on),
        counts,
        val_fraction=settings.val_fraction,
        max_samples=settings.max_samples,
        max_val_samples=settings.max_val_samples,
    )
    with SampleWriter(folder) as writer:
        writing = _Writing(settings, choice, counts, writer)
        encoder = Encoder(tokenizer, settings.train_on, settings.max_seq_len)
        workers = number_of_processes(settings.workers, choice.num_train + choice.num_validation)
        for chunk, encoded in encoded_chunks(encoder, _chosen_chunks(sources, choice), workers):
            writing.add(chunk, encoded)
        writing.finish(name)
    if [source.content_digest() for source in sources] != before:
        raise changed(name)
    bad_rows = [row for source in sources for row in source.bad_rows]
    counts["bad_rows"] = len(bad_rows)
    described = {
        "dialogues": [asdict(writing.dialogues[rank]) for rank in sorted(writing.dialogues)],
        "fingerprint": fingerprint_of_files(folder),
        "counts": dict(counts),
        "bad_rows": bad_rows,
        "name": name,
        "largest_token": writing.largest_token,
        "num_tokens": writing.num_tokens,
    }
    write_description(folder, described)


def changed(name: str) -> DataError:
    return DataError(f"{name}: the data has changed while it was read; start again")


def is_usable(example: Example, train_on: TrainOn) -> bool:
    """Whether there is something to learn."""
    if example.text is not None:
        return bool(example.text.strip())
    if train_on == "all":
        return any(message["content"].strip() for message in example.messages)
    replies = [message for message in example.messages if message["role"] == "assistant"]
    return any(map(_is_reply, replies[-1:] if train_on == "last_turn" else replies))


class _Writing:
    """What has been written so far.

    Attributes:
        dialogues: those of the validation samples that are first, by their rank.
        largest_token: id.
        num_tokens: of the training samples.
    """

    def __init__(self, settings: Preparation, choice: Choice, counts: Counter[str], writer: SampleWriter) -> None:
        self._settings, self._choice, self._counts, self._writer = settings, choice, counts, writer
        self._places = np.flatnonzero(choice.train | (choice.rank >= 0))  # numbers in the pass of what is encoded
        self._done = 0
        self._spans: list[NDArray[np.int64]] = []
        self._ranks: list[NDArray[np.int64]] = []
        self.dialogues: dict[int, Dialogue] = {}
        self.largest_token = 0
        self.num_tokens = 0

    def add(self, chunk: Sequence[Example], encoded: Encoded) -> None:
        """Write those of a chunk that have a trained token within `max_seq_len` and are not left out as too long."""
        lengths = np.minimum(encoded.lengths, self._settings.max_seq_len)
        kept = kept_of(self._settings, chunk, encoded, self._counts)
        by_token = np.repeat(kept, lengths)
        tokens = encoded.tokens[by_token]
        start = self._writer.add(tokens, encoded.trained[by_token])
        ranks = self._choice.rank[self._places[self._done : self._done + len(chunk)]]
        self._done += len(chunk)
        ends = np.cumsum(lengths[kept])
        self._spans.append(np.stack([start + ends - lengths[kept], lengths[kept]], axis=1))
        self._ranks.append(ranks[encoded.owners[kept]])
        self.num_tokens += int(lengths[kept][self._ranks[-1] < 0].sum())
        self.largest_token = max(self.largest_token, int(tokens.max(initial=0)))
        owners = {int(owner) for owner in encoded.owners[kept]}
        self._keep_dialogues({int(ranks[i]): chunk[i] for i in owners if ranks[i] >= 0})

    def finish(self, name: str) -> None:
        """Write where the samples are.

        Raises:
            DataError: there are none on one side.
        """
        spans, ranks = np.concatenate(self._spans), np.concatenate(self._ranks)
        by_rank = np.argsort(ranks, kind="stable")[int((ranks < 0).sum()) :]
        found = {"train": spans[ranks < 0], "validation": spans[by_rank]}
        given = {"train": self._choice.num_train, "validation": self._choice.num_validation}
        for side in SIDES:
            if not len(found[side]):
                said = "training" if side == "train" else side
                raise DataError(f"{name}: {said}: none of {given[side]} examples has {self._wanted()}")
            self._writer.finish(side, found[side])
            self._counts[side] = len(found[side])

    def _keep_dialogues(self, examples: dict[int, Example]) -> None:
        for rank, example in examples.items():
            if (dialogue := dialogue_of(example)) is not None:
                self.dialogues[rank] = dialogue
        for rank in sorted(self.dialogues)[NUM_DIALOGUES:]:
            del self.dialogues[rank]

    def _wanted(self) -> str:
        what = "a token to train on" if self._settings.train_on == "all" else "a reply"
        drop = " or say data.too_long=truncate" if self._settings.too_long == "drop" else ""
        return f"{what} within data.max_seq_len={self._settings.max_seq_len} tokens; raise it{drop}"


def kept_of(
    settings: Preparation, chunk: Sequence[Example], encoded: Encoded, counts: Counter[str]
) -> NDArray[np.bool_]:
    """Whether each sample has a trained token within `max_seq_len` and is not left out as too long; bool [samples].

    Raises:
        DataError: one is too long where that is refused.
    """
    limit, what = settings.max_seq_len, settings.too_long
    too_long = encoded.lengths > limit
    if what == "refuse" and too_long.any():
        first = int(too_long.argmax())
        raise DataError(
            f"{chunk[int(encoded.owners[first])].origin}: {encoded.lengths[first]} tokens, more than"
            f" data.max_seq_len={limit}; raise it or say data.too_long=truncate or drop"
        )
    stays = ~too_long if what == "drop" else np.ones_like(too_long)
    counts["dropped" if what == "drop" else "truncated"] += int(too_long.sum())
    counts["nothing_trained"] += int((stays & ~encoded.learns).sum())
    return stays & encoded.learns


def _chosen_chunks(sources: Sequence[Examples], choice: Choice) -> Iterator[list[Example]]:
    """Those of another pass that are used.

    Raises:
        DataError: there are more or fewer than in the first pass.
    """
    chosen = _chosen(sources, choice)
    while chunk := list(islice(chosen, CHUNK)):
        yield chunk


def _chosen(sources: Sequence[Examples], choice: Choice) -> Iterator[Example]:
    used = (choice.train | (choice.rank >= 0)).tobytes()
    number = -1
    for number, example in enumerate(chain.from_iterable(sources)):
        if number == len(used):
            break
        if used[number]:
            yield example
    if number + 1 != len(used):
        raise changed(sources[0].name)


def _is_reply(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip() or message.get("tool_calls"))


def dialogue_of(example: Example) -> Dialogue | None:
    """What is asked and the first reply, which is within `max_seq_len` if any is; None where there is none."""
    first = next((i for i, message in enumerate(example.messages) if _is_reply(message)), None)
    if first is None:
        return None
    return Dialogue(messages=list(example.messages[:first]), reply=example.messages[first]["content"])
