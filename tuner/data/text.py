"""Plain texts that the model learns to write on, without a chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tuner.data.dataset import Example
from tuner.data.layout import Layout
from tuner.data.records import Record


@dataclass(frozen=True)
class Text(Layout):
    """One text a row, all of it trained on.

    Args:
        text_column: the texts.
        chunk: a text of more than `max_seq_len` tokens is cut into pieces of so many, instead of what `too_long` says.
    """

    text_column: str
    chunk: bool

    name: ClassVar = "text"

    def example_of(self, record: Record) -> Example:
        text = record.text(self.text_column)
        return Example([], key=text, origin=record.origin, text=text, chunk=self.chunk)
