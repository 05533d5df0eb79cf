"""From conversations to a tokenized dataset: what every source of data does after reading its files.

Two passes over the source. The first decides which examples are used (`choice`) and keeps no text; the second encodes
those alone, in chunks, and writes them to flat files (`preparing`), where a run finds them again as long as nothing
that they are made of has changed (`cache`). Neither holds more than a few chunks in memory, whatever the file's size.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tuner.cache import cache_folder
from tuner.data.cache import cached_dataset, read_entry
from tuner.data.encoding import Encoder
from tuner.data.order import Grouped, Order, Packed, Shuffled
from tuner.data.preparing import prepare
from tuner.data.samples import StoredSamples
from tuner.data.streaming import stream
from tuner.errors import ConfigError
from tuner.types import Dataset, Fraction, Message, PositiveInt, Tokenizer

NO_CONTENT = (
    *("path", "val_path", "revision", "cache", "cache_dir", "workers"),
    *("streaming", "shuffle_buffer", "packing", "pack_len"),
)
"""Keys that change nothing in the prepared data: what is in a file counts, not where it is, and a revision counts as
the commit it names."""


@dataclass(frozen=True)
class Example:
    """One conversation, or one text, as it was read.

    Attributes:
        messages: its turns. Empty for a text.
        key: examples with equal keys are duplicates, and the key's digest decides the side of the split.
        origin: where it was read, as `FILE:LINE`.
        tools: what the assistant may call, as the chat template is given it: a JSON schema for each.
        text: in place of messages: a text without a template, all of which is trained on.
        chunk: a text of more than `max_seq_len` tokens is cut into pieces of so many, instead of what `too_long` says.
    """

    messages: Sequence[Message]
    key: str
    origin: str
    tools: Sequence[Mapping[str, Any]] | None = None
    text: str | None = None
    chunk: bool = False


class Examples(Protocol):
    """What a source has read or will read: examples in an order of their own, the same in every pass."""

    name: str
    """What the data is called in logs."""

    @property
    def bad_rows(self) -> Sequence[str]:
        """Rows that the passes so far left out because they are bad: where each is and why, said on stderr when met."""

    def __iter__(self) -> Iterator[Example]:
        """One pass.

        Raises:
            DataError: naming the file and the line.
        """

    def content_digest(self) -> str:
        """What the examples are read from, as a digest: equal digests give equal examples.

        Raises:
            DataError: it is not there.
        """


def say_left_out(bad_row: str) -> None:
    """One line on stderr."""
    print(f"left out, {bad_row}", file=sys.stderr)


@dataclass(frozen=True)
class Preparation(ABC):
    """How examples become a dataset: the keys that all members of the `data` group share, and what they do.

    A member is a subclass that adds its own keys and says which examples there are.

    Args:
        val_fraction: share of the distinct examples that is set aside for validation, above 0; at least one.
        max_seq_len: tokens of a sample at most.
        too_long: what happens to a longer one.
        max_samples: training examples at most, None for all.
        max_val_samples: validation examples at most, None for all that were set aside.
        train_on: the tokens that are trained on: those of every assistant turn with its end (`response`), of the last
            one (`last_turn`), or of the whole conversation, prompts included (`all`).
        cache: keep what was prepared, for the next run of the same data.
        cache_dir: where; None is `data` in the cache of this package.
        streaming: train on rows as they are read, instead of preparing all of them first.
        shuffle_buffer: while streaming, rows among which the next one is drawn.
        workers: processes that tokenize, 1 for this one alone; None is one a core, up to 8, where the data is large.
        packing: `none` trains on samples in random order, `group` on samples of about one length together, `pack` on
            rows of several whole samples, none of which sees another.
        pack_len: tokens of a packed row, None for `max_seq_len`.
    """

    val_fraction: Fraction
    max_seq_len: PositiveInt
    too_long: Literal["truncate", "drop", "refuse"]
    max_samples: PositiveInt | None
    max_val_samples: PositiveInt | None
    train_on: Literal["response", "all", "last_turn"]
    cache: bool
    cache_dir: str | None
    workers: PositiveInt | None
    streaming: bool
    shuffle_buffer: PositiveInt
    packing: Literal["none", "group", "pack"]
    pack_len: PositiveInt | None

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ConfigError(
                f"data.val_fraction: {self.val_fraction} leaves nothing to "
                f"{'validate' if self.val_fraction <= 0 else 'train'} on; give a fraction between 0 and 1, as 0.1"
            )

    @abstractmethod
    def examples(self) -> Examples:
        """What there is to train on and, without `validation_examples`, to validate on."""

    def validation_examples(self) -> Examples | None:
        """Examples of their own to validate on, so that none are set aside; None where there are none."""
        return None

    def load(self, tokenizer: Tokenizer) -> Dataset:
        """Read, split and tokenize, or find what an earlier run of the same data has prepared; or begin to stream it.

        Raises:
            DataError: naming file and line of what cannot be read; too few examples, one that is too long where that is
                refused, or nothing is left; the cache cannot be written.
        """
        sources = [self.examples(), *filter(None, [self.validation_examples()])]
        if self.streaming:
            encoder = Encoder(tokenizer, self.train_on, self.max_seq_len)
            return stream(self, sources, encoder, self._made_of(sources, tokenizer, self.shuffle_buffer))
        prepared = self._prepared(sources, tokenizer)
        if not any(source.bad_rows for source in sources):  # it was prepared by another process, or long ago
            for bad_row in prepared.bad_rows:
                say_left_out(bad_row)
        if lost := prepared.counts.get("nothing_trained"):
            warnings.warn(
                f"{prepared.name}: samples left out: {lost:,}; cut at data.max_seq_len={self.max_seq_len} tokens,"
                " nothing of them is left to train on",
                stacklevel=2,
            )
        return prepared

    def _prepared(self, sources: Sequence[Examples], tokenizer: Tokenizer) -> Dataset:
        if not self.cache:
            with tempfile.TemporaryDirectory(prefix="tuner-data-") as temporary:
                prepare(self, sources, tokenizer, Path(temporary))
                return read_entry(Path(temporary))  # open files stay when they are deleted
        folder = Path(self.cache_dir).expanduser().absolute() if self.cache_dir else cache_folder() / "data"
        key = self._key(sources, tokenizer)
        return cached_dataset(folder, key, lambda entry: prepare(self, sources, tokenizer, entry))

    def order(self, dataset: Dataset, *, seed: int, window: int) -> Order:
        """How the training samples are put into rows, and in which order.

        Args:
            dataset: what `load` gave.
            seed: of the run.
            window: rows of one optimizer step.
        """
        stored = dataset.train
        lengths = (
            stored.lengths.tolist() if isinstance(stored, StoredSamples) else [len(sample.tokens) for sample in stored]
        )
        if self.packing == "pack":
            row_tokens = self.pack_len or self.max_seq_len
            return Packed(lengths, seed=seed, fingerprint=dataset.fingerprint, row_tokens=row_tokens)
        if self.packing == "group":
            return Grouped(lengths, seed=seed, fingerprint=dataset.fingerprint, window=window)
        return Shuffled(lengths, seed=seed, fingerprint=dataset.fingerprint)

    def _key(self, sources: Sequence[Examples], tokenizer: Tokenizer) -> str:
        """Digest of everything that the prepared data is made of, this code included."""
        modules = {Path(inspect.getfile(type(self))), *Path(__file__).parent.glob("*.py")}
        code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(modules)]
        return self._made_of(sources, tokenizer, code)[:32]

    def _made_of(self, sources: Sequence[Examples], tokenizer: Tokenizer, more: object) -> str:
        """Digest of content, tokenizer, settings and something more."""
        settings = {key: value for key, value in asdict(self).items() if key not in NO_CONTENT}
        contents = [source.content_digest() for source in sources]
        made_of = [type(self).__qualname__, settings, contents, tokenizer.digest(), more]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
