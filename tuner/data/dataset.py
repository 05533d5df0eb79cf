"""From conversations to a tokenized dataset: what every source of data does after reading its files.

The order matters. Duplicates go first, then examples are split by a digest of their key, so that no key is on both
sides and equal files give equal splits in every process; then `max_samples` and `max_val_samples` choose by the same
digest (a fixed random choice, not the head of the file); only what is left is rendered and tokenized.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from tuner.errors import ConfigError, DataError
from tuner.types import IGNORE, Dataset, Dialogue, Message, Sample, Tokenizer

NUM_DIALOGUES = 8
"""Validation examples that are kept as text too."""

_CHUNK = 1024  # conversations encoded at once: what the encoder says of each takes far more room than its ids


@dataclass(frozen=True)
class Example:
    """One conversation as it was read.

    Attributes:
        messages: its turns; every assistant turn is trained on.
        key: examples with equal keys are duplicates, and the key's digest decides the side of the split.
        origin: where it was read, as `FILE:LINE`.
    """

    messages: Sequence[Message]
    key: str
    origin: str


@runtime_checkable
class BatchEncoder(Protocol):
    """A tokenizer that encodes many conversations at once faster than one by one."""

    def encode_chats(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]]]: ...


@dataclass(frozen=True)
class Preparation:
    """How examples become a dataset; the keys which all sources share.

    Attributes:
        val_fraction: share of the distinct examples that is set aside, above 0; at least one.
        max_seq_len: tokens of a sample at most.
        too_long: what happens to a longer one.
        max_samples: training examples at most, None for all.
        max_val_samples: validation examples at most, None for all that were set aside.
    """

    val_fraction: float
    max_seq_len: int
    too_long: Literal["truncate", "drop", "refuse"]
    max_samples: int | None
    max_val_samples: int | None

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ConfigError(
                f"data.val_fraction: {self.val_fraction} leaves nothing to "
                f"{'validate' if self.val_fraction <= 0 else 'train'} on; give a fraction between 0 and 1, as 0.1"
            )

    def prepare(self, name: str, examples: Sequence[Example], tokenizer: Tokenizer) -> Dataset:
        """Split and tokenize.

        Raises:
            DataError: if there are too few examples, one is too long and that is refused, or nothing is left.
        """
        counts = Counter(examples=len(examples))
        distinct = _without_empty_and_duplicates(examples, counts)
        train, validation = self._split(name, distinct, counts)
        train_samples = [sample for _, sample in self._tokenize(f"{name}: training", train, tokenizer, counts)]
        kept = self._tokenize(f"{name}: validation", validation, tokenizer, counts)
        validation_samples = [sample for _, sample in kept]
        counts.update(train=len(train_samples), validation=len(validation_samples))
        return Dataset(
            train=train_samples,
            validation=validation_samples,
            dialogues=[_dialogue(example) for example, _ in kept[:NUM_DIALOGUES]],
            fingerprint=fingerprint(train_samples, validation_samples),
            counts=dict(counts),
            name=name,
        )

    def _split(
        self, name: str, examples: Sequence[Example], counts: Counter[str]
    ) -> tuple[list[Example], list[Example]]:
        """Training examples in their order, validation examples in the order of their digests."""
        if len(examples) < 2:
            raise DataError(
                f"{name}: {len(examples)} usable example{'' if len(examples) == 1 else 's'} of {counts['examples']}"
                " read; it takes two different ones at least, one to train and one to validate on"
            )
        digests = [_digest(example.key) for example in examples]
        ranked = sorted(range(len(examples)), key=digests.__getitem__)
        num_validation = min(max(1, round(self.val_fraction * len(examples))), len(examples) - 1)
        validation, train = ranked[:num_validation], ranked[num_validation:]
        kept_validation, kept_train = validation[: self.max_val_samples], train[: self.max_samples]
        counts["validation_unused"] = len(validation) - len(kept_validation)
        counts["train_unused"] = len(train) - len(kept_train)
        return [examples[i] for i in sorted(kept_train)], [examples[i] for i in kept_validation]

    def _tokenize(
        self, what: str, examples: Sequence[Example], tokenizer: Tokenizer, counts: Counter[str]
    ) -> list[tuple[Example, Sample]]:
        """The examples that have a trained token within `max_seq_len`, and their samples."""
        kept = []
        for example, ids, is_reply in _encode(examples, tokenizer):
            if len(ids) > self.max_seq_len and not self._may_truncate(example, len(ids), counts):
                continue
            sample = _sample(ids[: self.max_seq_len], is_reply[: self.max_seq_len])
            # A prediction exists from the second position on
            if any(label != IGNORE for label in sample.labels[1:]):
                kept.append((example, sample))
            else:
                counts["nothing_trained"] += 1
        if not kept:
            raise DataError(
                f"{what}: none of {len(examples)} examples has a reply within data.max_seq_len={self.max_seq_len}"
                " tokens; raise it" + (" or say data.too_long=truncate" if self.too_long == "drop" else "")
            )
        return kept

    def _may_truncate(self, example: Example, num_tokens: int, counts: Counter[str]) -> bool:
        if self.too_long == "refuse":
            raise DataError(
                f"{example.origin}: {num_tokens} tokens, more than data.max_seq_len={self.max_seq_len}; raise it or say"
                " data.too_long=truncate or drop"
            )
        counts["truncated" if self.too_long == "truncate" else "dropped"] += 1
        return self.too_long == "truncate"


def fingerprint(*sides: Sequence[Sample]) -> str:
    """sha256, in hex, over the tokens and labels of all samples in their order."""
    digest = hashlib.sha256()
    for samples in sides:
        digest.update(len(samples).to_bytes(8, "little"))
        for sample in samples:
            digest.update(len(sample.tokens).to_bytes(8, "little"))
            digest.update(np.asarray(sample.tokens, dtype="<i4").tobytes())
            digest.update(np.asarray(sample.labels, dtype="<i4").tobytes())
    return digest.hexdigest()


def _encode(examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[tuple[Example, list[int], list[bool]]]:
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        conversations = [example.messages for example in chunk]
        if isinstance(tokenizer, BatchEncoder):
            encoded = tokenizer.encode_chats(conversations)
        else:
            encoded = [tokenizer.encode_chat(messages) for messages in conversations]
        for example, (ids, is_reply) in zip(chunk, encoded, strict=True):
            yield example, ids, is_reply


def _sample(ids: Sequence[int], is_reply: Sequence[bool]) -> Sample:
    # Arrays of 4-byte integers: lists of Python's integers take ten times the memory
    labels = array("i", [id_ if trained else IGNORE for id_, trained in zip(ids, is_reply, strict=True)])
    return Sample(array("i", ids), labels)


def _without_empty_and_duplicates(examples: Sequence[Example], counts: Counter[str]) -> list[Example]:
    """Examples with something to learn, the first of each key."""
    with_reply = [example for example in examples if any(_is_reply(message) for message in example.messages)]
    distinct: dict[str, Example] = {}
    for example in with_reply:
        distinct.setdefault(example.key, example)
    counts["empty"] = len(examples) - len(with_reply)
    counts["duplicates"] = len(with_reply) - len(distinct)
    return list(distinct.values())


def _is_reply(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip())


def _dialogue(example: Example) -> Dialogue:
    # The first reply, which is within max_seq_len if any is
    first = next(i for i, message in enumerate(example.messages) if _is_reply(message))
    return Dialogue(messages=example.messages[:first], reply=example.messages[first]["content"])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
