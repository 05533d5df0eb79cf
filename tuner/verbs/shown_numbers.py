"""Numbers for a person: counts with what they mean, lengths as a histogram."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from tuner.types import IGNORE, Sample, Tokenizer
from tuner.verbs.shown_samples import clean, look_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

NUM_BARS = 12
BAR_WIDTH = 40
WIDTH = 100
"""Of what goes into a file or a pipe; a terminal has its own."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of each sample.

    Attributes:
        tokens: int64 [samples], all of them.
        trained: int64 [samples], those that a prediction is made for and that count.
        last: the last trained token of each sample that has one.
    """

    tokens: np.ndarray
    trained: np.ndarray
    last: Counter[int]


def lengths_of(samples: Iterable[Sample]) -> Lengths:
    tokens, trained, last = [], [], Counter[int]()
    for sample in samples:
        labels = np.asarray(sample.labels)
        counts = np.flatnonzero(labels[1:] != IGNORE)
        tokens.append(len(labels))
        trained.append(len(counts))
        if len(counts):
            last[int(labels[counts[-1] + 1])] += 1
    return Lengths(np.array(tokens, dtype=np.int64), np.array(trained, dtype=np.int64), last)


def console_of_here() -> Console:
    """A terminal with its own width and colours, or lines for a file."""
    from rich.console import Console

    words = {"markup": False, "highlight": False, "emoji": False, "soft_wrap": True}
    if sys.stdout.isatty():
        return Console(**words)  # type: ignore[arg-type]
    return Console(**words, force_terminal=False, color_system=None, width=WIDTH)  # type: ignore[arg-type]


def print_lengths(console: Console, lengths: Lengths, which: str) -> None:
    """How many samples have how many tokens, and what is usual; `which` says of which samples, behind the heading."""
    console.print(heading(f"Tokens of a training sample{which}"))
    edges = _edges(int(lengths.tokens.min()), int(lengths.tokens.max()))
    numbers = np.histogram(lengths.tokens, bins=[*edges[:-1], edges[-1] + 1])[0]
    names = [
        f"{first:,} to {behind - 1:,}" if behind - 1 > first else f"{first:,}" for first, behind in pairwise(edges)
    ]
    width, widest = max(map(len, names)), max(len(f"{number:,}") for number in numbers)
    for name, number in zip(names, numbers, strict=True):
        bar = look_of(console).bar * max(round(BAR_WIDTH * number / numbers.max()), int(number > 0))
        console.print(f"  {name.rjust(width)}  {f'{number:,}'.rjust(widest)}  {bar}".rstrip())
    for name, values in {"all": lengths.tokens, "trained": lengths.trained}.items():
        quantiles = np.quantile(values, [0.5, 0.95], method="inverted_cdf")
        parts = {"min": values.min(), "median": quantiles[0], "p95": quantiles[1], "max": values.max()}
        said = "  ".join(f"{what} {int(value):,}" for what, value in parts.items())
        console.print(f"  {name.ljust(7)}  {said}  mean {values.mean():,.1f}")
    console.print()


def ends_of(lengths: Lengths, tokenizer: Tokenizer) -> str:
    """The commonest last trained tokens, with their shares: a reply that does not end teaches a model not to end."""
    most, all_of_them = lengths.last.most_common(3), lengths.last.total()
    named = [f"{clean(tokenizer.decode([id_]))!r} {100 * count / all_of_them:.1f} %" for id_, count in most]
    rest = all_of_them - sum(count for _, count in most)
    return ", ".join([*named, *([f"others {100 * rest / all_of_them:.1f} %"] if rest else [])])


def print_rows(console: Console, rows: Mapping[str, tuple[str, str]]) -> None:
    """A line each: name, number, what it means."""
    name_width = max(map(len, rows))
    width = max(len(value) for value, meaning in rows.values() if meaning) if any(m for _, m in rows.values()) else 0
    for name, (value, meaning) in rows.items():
        console.print(f"  {name.ljust(name_width)}  {value.rjust(width) if meaning else value}  {meaning}".rstrip())
    console.print()


def heading(text: str) -> Text:
    from rich.text import Text

    return Text(text, style="bold")


def rule(console: Console, text: str) -> Text:
    from rich.text import Text

    line = look_of(console).line
    return Text(f"{line * 2} {text} {line * max(console.width - len(text) - 4, 2)}", style="dim")


def _edges(shortest: int, longest: int) -> list[int]:
    """Where bars begin, and behind the last one: multiples of 1, 2 or 5 times a power of ten."""
    steps = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    step = next(step for step in steps if (longest // step) - (shortest // step) < NUM_BARS)
    return list(range(shortest // step * step, longest + step + 1, step))
