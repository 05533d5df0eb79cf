"""Samples from a source as it is read, for data that is not prepared first.

The examples to train on pass through a buffer: a draw that depends on seed, epoch and fingerprint alone says which one
leaves it for the next to enter. What is shuffled are examples and not their tokens, so that a run which is resumed
reads again what it has seen and tokenizes none of it.

A digest of its key decides the side of a row by itself, without regard to the others: below `val_fraction` of all
digests it is never trained on. Of each example that is trained on the digest is kept, about 100 bytes a row, to leave
out duplicates.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tuner.data.choice import DIGEST_BYTES, digest_of
from tuner.data.encoding import Encoder
from tuner.data.preparing import NUM_DIALOGUES, dialogue_of, is_usable, kept_of
from tuner.errors import DataError
from tuner.types import IGNORE, Dataset, DrawnSample, Sample, StreamPosition

if TYPE_CHECKING:
    from tuner.data.dataset import Example, Examples, Preparation

T = TypeVar("T")

HEAD = 100_000
"""Examples at the head of the data among which those to validate on are looked for."""

CHUNK = 64
"""Examples encoded at once, while those before them are trained on."""


class Stream:
    """See `tuner.types.SampleStream`.

    Args:
        settings: the keys.
        source: passed over once an epoch.
        encoder: of examples.
        fingerprint: of the content and the settings.
        held_out: digests of what is validated on, beside those that `val_fraction` sets aside.
        sets_aside: whether it does.
    """

    def __init__(
        self,
        settings: Preparation,
        source: Examples,
        encoder: Encoder,
        fingerprint: str,
        held_out: frozenset[bytes],
        sets_aside: bool,
    ) -> None:
        self.fingerprint = fingerprint
        self.counts: Counter[str] = Counter()
        self._settings, self._source, self._encoder = settings, source, encoder
        self._held_out, self._sets_aside = held_out, sets_aside

    def samples(self, seed: int, position: StreamPosition) -> Generator[DrawnSample, None, None]:
        """What is left of an epoch.

        Args:
            seed: of the run.
            position: where the epoch goes on; what is before it is read and not tokenized.

        Raises:
            DataError: a row that cannot be read, or is too long where that is refused.
        """
        examples = self._shuffled(seed, position.epoch)
        chunks = iter(lambda: list(islice(examples, CHUNK)), [])
        next(islice(examples, position.index, position.index), None)
        at, skipped = position.index, position.piece
        for samples in _one_ahead(self._encoded(chunk) for chunk in chunks):
            for pieces in samples:
                for number, sample in enumerate(pieces):
                    if number >= skipped:
                        last = number + 1 == len(pieces)
                        after = (at + 1, 0) if last else (at, number + 1)
                        yield DrawnSample(sample, StreamPosition(position.epoch, *after))
                at, skipped = at + 1, 0

    def _encoded(self, chunk: Sequence[Example]) -> list[list[Sample]]:
        """The samples of each example, none where it is left out."""
        found: list[list[Sample]] = [[] for _ in chunk]
        for owner, sample in samples_of(self._settings, self._encoder, chunk, self.counts):
            found[owner].append(sample)
        return found

    def _shuffled(self, seed: int, epoch: int) -> Iterator[Example]:
        digest = hashlib.sha256(f"{seed}/{epoch}/{self.fingerprint}".encode()).digest()
        draw = random.Random(int.from_bytes(digest, "little")).random  # the one method that Python never changes
        buffer: list[Example] = []
        for example in self._to_train():
            if len(buffer) < self._settings.shuffle_buffer:
                buffer.append(example)
                continue
            at = int(draw() * len(buffer))
            yield buffer[at]
            buffer[at] = example
        while buffer:
            at = int(draw() * len(buffer))
            buffer[at], buffer[-1] = buffer[-1], buffer[at]
            yield buffer.pop()

    def _to_train(self) -> Iterator[Example]:
        """One pass: usable examples, the first of each key, that are not set aside."""
        seen: set[bytes] = set()
        for example in self._source:
            self.counts["examples"] += 1
            digest = digest_of(example.key)
            if not is_usable(example, self._settings.train_on):
                self.counts["empty"] += 1
            elif digest in self._held_out or (self._sets_aside and is_set_aside(digest, self._settings.val_fraction)):
                self.counts["set_aside"] += 1
            elif digest in seen:
                self.counts["duplicates"] += 1
            else:
                seen.add(digest)
                yield example


def stream(settings: Preparation, sources: Sequence[Examples], encoder: Encoder, fingerprint: str) -> Dataset:
    """A dataset whose training samples are read as it is trained, and whose validation samples are read now.

    Args:
        settings: the keys.
        sources: what is trained on, and perhaps what is validated on.
        encoder: of examples.
        fingerprint: of the content and the settings.

    Raises:
        DataError: nothing to validate on; or what reading raises.
    """
    name, counts = sources[0].name, Counter[str]()
    examples = _to_validate(settings, sources)
    kept = list(samples_of(settings, encoder, examples, counts))
    if not kept:
        among = "" if len(sources) > 1 else f" in the first {HEAD:,} examples, of which val_fraction sets aside a share"
        raise DataError(
            f"{name}: validation: none of {len(examples)} examples{among} has a token to train on within"
            f" data.max_seq_len={settings.max_seq_len}; say data.val_path=FILE, or a larger data.val_fraction"
        )
    dialogues = [dialogue_of(examples[owner]) for owner in dict.fromkeys(owner for owner, _ in kept)]
    held_out = frozenset(digest_of(example.key) for example in examples)
    validation = [sample for _, sample in kept]
    return Dataset(
        train=(),
        validation=validation,
        dialogues=[dialogue for dialogue in dialogues if dialogue is not None][:NUM_DIALOGUES],
        fingerprint=fingerprint,
        counts={"validation": len(validation), **counts},
        name=f"{name}, streamed",
        largest_token=max(max(sample.tokens) for sample in validation),
        num_tokens=0,
        stream=Stream(settings, sources[0], encoder, fingerprint, held_out, sets_aside=len(sources) == 1),
    )


def is_set_aside(digest: bytes, val_fraction: float) -> bool:
    """Whether a row is on the validation side, which is decided for each by itself."""
    return int.from_bytes(digest, "big") < val_fraction * (1 << 8 * DIGEST_BYTES)


def samples_of(
    settings: Preparation, encoder: Encoder, examples: Sequence[Example], counts: Counter[str]
) -> Iterator[tuple[int, Sample]]:
    """The samples of examples, each with the number of its example.

    Raises:
        DataError: one is too long where that is refused.
    """
    encoded = encoder(examples)
    ends = np.cumsum(np.minimum(encoded.lengths, settings.max_seq_len)).tolist()
    kept = kept_of(settings, examples, encoded, counts)
    for start, end, owner, keep in zip([0, *ends], ends, encoded.owners.tolist(), kept.tolist(), strict=False):
        if keep:
            ids, trained = encoded.tokens[start:end], encoded.trained[start:end]
            labels = np.where(trained, ids, IGNORE)
            yield owner, Sample(array("i", ids.tolist()), array("i", labels.tolist()))


def _to_validate(settings: Preparation, sources: Sequence[Examples]) -> list[Example]:
    """The first distinct ones, of their own source or set aside at the head of the only one."""
    found: dict[bytes, Example] = {}
    examples = iter(sources[1]) if len(sources) > 1 else islice(sources[0], HEAD)
    for example in examples:
        digest = digest_of(example.key)
        if len(found) == settings.max_val_samples:
            break
        if is_usable(example, settings.train_on) and (len(sources) > 1 or is_set_aside(digest, settings.val_fraction)):
            found.setdefault(digest, example)
    return list(found.values())


def _one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as thread:
        end = object()
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item  # type: ignore[misc] # it is not the end
