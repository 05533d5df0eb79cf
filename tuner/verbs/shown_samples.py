"""A sample as text: what is trained on in colour or in brackets, control tokens standing out, line ends visible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from tuner.types import IGNORE, Sample, Tokenizer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

HEAD, TAIL = 700, 300
"""Characters of a stretch that are shown at its beginning and at its end; the rest is counted."""

TRAINED, CONTROL, TRAINED_CONTROL, QUIET = "green", "dim", "bold green reverse", "dim"


@dataclass(frozen=True)
class Look:
    """How a sample is shown.

    Attributes:
        opened: before trained text, where there is no colour.
        closed: behind it.
        newline: what stands for the end of a line, before it.
        bar: of a histogram.
        line: of a rule.
        legend: what it means.
    """

    opened: str
    closed: str
    newline: str
    bar: str
    line: str
    legend: str


def look_of(console: Console) -> Look:
    """Colours on a terminal that has them, brackets elsewhere; plain letters where the encoding has no others."""
    try:
        "⟦⟧↵█─".encode(console.encoding)
        opened, closed, newline, bar, line = "⟦⟧↵█─"
    except UnicodeEncodeError:
        opened, closed, newline, bar, line = "[[", "]]", "", "#", "-"
    if console.color_system is not None:
        return Look(
            "", "", newline, bar, line, "what is trained on is green, tokens of the template are inverted or dim"
        )
    return Look(opened, closed, newline, bar, line, f"what is trained on stands in {opened} {closed}")


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens that are shown alike."""

    text: str
    trained: bool
    control: bool


def shown_sample(sample: Sample, tokenizer: Tokenizer, look: Look) -> Text:
    """The text of a sample, each stretch of it shortened in its middle where it is long."""
    from rich.text import Text

    shown = Text()
    inside = False
    for stretch in stretches(sample, tokenizer):
        if stretch.trained is not inside:
            shown.append(look.opened if stretch.trained else look.closed, style="bold")
            inside = stretch.trained
        style = {
            (True, True): TRAINED_CONTROL,
            (True, False): TRAINED,
            (False, True): CONTROL,
            (False, False): "",
        }[stretch.trained, stretch.control]
        shown.append(clean(_shortened(stretch.text), look.newline), style=style)
    shown.append(look.closed if inside else "", style="bold")
    shown.rstrip()
    return shown


def stretches(sample: Sample, tokenizer: Tokenizer) -> Iterator[Stretch]:
    """A sample's text taken apart where training begins or ends and at control tokens; nothing is left out.

    Tokens are decoded behind those before them, since the space that begins a word is shown only there.
    """
    ids = list(sample.tokens)
    control = {id_ for id_ in set(ids) if tokenizer.decode([id_], skip_special_tokens=True) == ""}
    # The first token of a sample is predicted by nothing
    kinds = [(i > 0 and label != IGNORE, ids[i] in control) for i, label in enumerate(sample.labels)]
    done, before = 0, ""
    for (trained, is_control), group in groupby(kinds):
        done += len(list(group))
        text = tokenizer.decode(ids[:done])
        start = len(before) if text.startswith(before) else len(before.rstrip("\N{REPLACEMENT CHARACTER}"))
        yield Stretch(text[start:], trained, is_control)
        before = text


def _shortened(text: str) -> str:
    if len(text) <= HEAD + TAIL + 100:
        return text
    return f"{text[:HEAD]} ... {len(text) - HEAD - TAIL:,} characters ... {text[-TAIL:]}"


def clean(text: str, newline: str = "") -> str:
    """Text whose control characters, which could clear a terminal, are spelt; `newline` stands before line ends."""
    spelt = (char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
    return "".join(spelt).replace("\n", f"{newline}\n")
