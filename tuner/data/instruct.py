"""Any two columns of texts as what a person asks and what the model replies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

from tuner.data.dataset import Example
from tuner.data.layout import Layout
from tuner.data.records import Record
from tuner.types import Message


@dataclass(frozen=True)
class Instruct(Layout):
    """One turn a row.

    Args:
        prompt_column: what the person asks.
        response_column: the reply.
        system_column: texts of system messages, empty or null for a row without one; None for no such column.
    """

    prompt_column: str
    response_column: str
    system_column: str | None

    name: ClassVar = "instruct"

    def example_of(self, record: Record) -> Example:
        system = ""
        if self.system_column is not None and record.value(self.system_column) is not None:
            system = record.text(self.system_column)
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        messages += [
            {"role": "user", "content": record.text(self.prompt_column)},
            {"role": "assistant", "content": record.text(self.response_column)},
        ]
        return Example(messages, key=json.dumps(messages), origin=record.origin)
