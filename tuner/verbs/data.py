"""`tuner data`: the dataset as the model will see it, before anything is trained."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig

from tuner.errors import DataError
from tuner.types import Dataset, DataSource, Sample, SampleStream, StreamPosition, Tokenizer
from tuner.verbs.shown_numbers import (
    console_of_here,
    ends_of,
    heading,
    lengths_of,
    print_lengths,
    print_rows,
    rule,
)
from tuner.verbs.shown_samples import look_of, shown_sample
from tuner.vocabulary import require_embedded, tokens_at_hand

if TYPE_CHECKING:
    from rich.console import Console

HEAD = 1000
"""Samples of a stream that are read and counted: a second or two, and enough for a share of one in a hundred."""

MEANING = {
    "examples": "read",
    "duplicates": "occur before",
    "empty": "have nothing to learn",
    "truncated": "cut at data.max_seq_len",
    "dropped": "longer than data.max_seq_len",
    "nothing_trained": "dropped: no trained token within data.max_seq_len",
    "train": "to train on",
    "validation": "to validate on",
    "set_aside": "never trained on",
    "train_unused": "left out by data.max_samples",
    "validation_unused": "left out by data.max_val_samples",
}
"""What the counts of a dataset say; a count that is not here stands alone."""


@dataclass(frozen=True)
class Seen:
    """The training samples that were looked at.

    Attributes:
        samples: all there are, or those at the head of a stream.
        first: those that the run begins with, in its order.
        counts: what became of the examples.
        steps: of an epoch; None where only the head of a stream was read.
        which: behind headings, of which samples it is told; empty where it is all of them.
    """

    samples: Sequence[Sample]
    first: Sequence[Sample]
    counts: Mapping[str, int]
    steps: int | None
    which: str = ""


def data(cfg: DictConfig, overrides: list[str]) -> str:
    """Samples with what is trained marked, counts, lengths and totals; no weights are read.

    Of a stream it is told what its first `HEAD` samples are, in the order in which the run will see them. How much an
    epoch is, nobody knows before it was read.

    Raises:
        TunerError: a tokenizer or data that cannot be loaded, as the run would raise it.
    """
    config, vocabulary = tokens_at_hand(instantiate(cfg.model), Path(cfg.adapter) if cfg.adapter else None)
    tokenizer = vocabulary.tokenizer
    source: DataSource = instantiate(cfg.data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is left out is among the counts below
        dataset = source.load(tokenizer)
    seen = _prepared(source, dataset, cfg) if dataset.stream is None else _streamed(dataset.stream, dataset, cfg)
    of_stream = (max(sample.tokens) for sample in seen.samples if dataset.stream is not None)
    require_embedded([tokenizer.pad_id, dataset.largest_token, *of_stream], config, vocabulary.new_tokens)
    console = console_of_here()
    with console.capture() as captured:
        _print_samples(console, seen, tokenizer)
        _print_counts(console, dataset, seen)
        print_lengths(console, lengths_of(seen.samples), seen.which)
        _print_totals(console, dataset, seen, tokenizer, cfg)
    return captured.get().rstrip("\n")


def _prepared(source: DataSource, dataset: Dataset, cfg: DictConfig) -> Seen:
    order = source.order(dataset, seed=cfg.seed, window=_window(cfg))
    first = [dataset.train[i] for i in islice(chain.from_iterable(order.rows(0)), cfg.train.num_samples)]
    return Seen(dataset.train, first, dataset.counts, -(-order.num_rows // _window(cfg)))


def _streamed(stream: SampleStream, dataset: Dataset, cfg: DictConfig) -> Seen:
    with closing(stream.samples(cfg.seed, StreamPosition())) as drawn:
        samples = [one.sample for one in islice(drawn, HEAD)]
        ended = next(drawn, None) is None
    if not samples:
        raise DataError(f"{dataset.name}: there is no sample to train on in all of the data")
    counts = Counter(dataset.counts) + Counter(stream.counts)  # settled once the stream is closed, which reads ahead
    first = samples[: cfg.train.num_samples]
    if ended:
        return Seen(samples, first, counts, -(-len(samples) // _window(cfg)))
    return Seen(samples, first, counts, None, f", of the first {len(samples):,} samples")


def _window(cfg: DictConfig) -> int:
    """Rows of a step."""
    rows = 1 if cfg.train.batch_size == "auto" else cfg.train.batch_size
    return int(rows * cfg.train.gradient_accumulation_steps)


def _print_samples(console: Console, seen: Seen, tokenizer: Tokenizer) -> None:
    """The first samples of the first epoch, in the order in which the run will see them."""
    look = look_of(console)
    if seen.first:
        first = "first sample" if len(seen.first) == 1 else f"first {len(seen.first)} samples"
        console.print(f"The {first} of the run; {look.legend}")
    for number, sample in enumerate(seen.first, start=1):
        tokens, trained = len(sample.tokens), int(lengths_of([sample]).trained[0])
        console.print(rule(console, f"sample {number}: {tokens:,} tokens, {trained:,} trained"))
        console.print(shown_sample(sample, tokenizer, look))
    console.print()


def _print_counts(console: Console, dataset: Dataset, seen: Seen) -> None:
    read = f": read for its first {len(seen.samples):,} samples" if seen.which else ""
    console.print(heading(f"Examples of {dataset.name}{read}"))
    always = ("examples", "duplicates", "truncated", "dropped")
    counts = {**dict.fromkeys(always, 0), **seen.counts}
    rows = {
        name.replace("_", " "): (f"{count:,}", MEANING.get(name, ""))
        for name, count in counts.items()
        if count or name in always
    }
    print_rows(console, rows)


def _print_totals(console: Console, dataset: Dataset, seen: Seen, tokenizer: Tokenizer, cfg: DictConfig) -> None:
    lengths, validation = lengths_of(seen.samples), lengths_of(dataset.validation)
    if seen.steps is None:
        console.print(heading("A step, on the average"))
        rows = _of_step(float(lengths.tokens.mean()), float(lengths.trained.mean()), cfg)
    else:
        console.print(heading("An epoch"))
        rows = _of_epoch(int(lengths.tokens.sum()), int(lengths.trained.sum()), seen.steps, cfg)
    rows |= {
        "validation tokens": (f"{validation.tokens.sum():,}", f"{validation.trained.sum():,} trained"),
        "replies end with": (ends_of(lengths, tokenizer), ""),
        "fingerprint": (dataset.fingerprint[:16], ""),
    }
    print_rows(console, rows)


def _of_epoch(tokens: int, trained: int, steps: int, cfg: DictConfig) -> dict[str, tuple[str, str]]:
    total = cfg.train.max_steps or cfg.train.epochs * steps
    return {
        "tokens": (f"{tokens:,}", f"prompts and template included; {tokens / steps:,.0f} a step"),
        "trained tokens": (f"{trained:,}", f"{100 * trained / tokens:.1f} %; {trained / steps:,.0f} a step"),
        "steps": (f"{steps:,}", _sizes(cfg)),
        "steps of this run": (f"{total:,}", f"{total / steps:,.2f} epochs, about {tokens * total / steps:,.0f} tokens"),
    }


def _of_step(tokens: float, trained: float, cfg: DictConfig) -> dict[str, tuple[str, str]]:
    """Where an epoch is not known.

    Args:
        tokens: of a sample.
        trained: of a sample.
        cfg: the configuration.
    """
    window, total = _window(cfg), cfg.train.max_steps
    return {
        "tokens": (f"{tokens * window:,.0f}", f"prompts and template included; {_sizes(cfg)}"),
        "trained tokens": (f"{trained * window:,.0f}", f"{100 * trained / tokens:.1f} %"),
        "steps of this run": (f"{total:,}", f"about {tokens * window * total:,.0f} tokens"),
        "steps of an epoch": ("not known", "before all of the stream was read"),
    }


def _sizes(cfg: DictConfig) -> str:
    accumulation = cfg.train.gradient_accumulation_steps
    return f"train.batch_size={cfg.train.batch_size} x train.gradient_accumulation_steps={accumulation}"
