"""Instructions in the Alpaca layout: rows of an instruction, an input (may be empty or absent) and an output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

from tuner.data.dataset import Example
from tuner.data.layout import Layout
from tuner.data.records import Record
from tuner.types import Message

# The wording of https://github.com/tatsu-lab/stanford_alpaca, on which models of this kind were trained
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class Alpaca(Layout):
    """The prompt is the user's message, the output the reply.

    Args:
        instruction_column: texts that say what to do.
        input_column: texts that it is to be done with; a row may lack it. None for no such column.
        output_column: the replies.
    """

    instruction_column: str
    input_column: str | None
    output_column: str

    name: ClassVar = "alpaca"

    def example_of(self, record: Record) -> Example:
        instruction, output = record.text(self.instruction_column), record.text(self.output_column)
        context = record.text_if_any(self.input_column)
        prompt = PROMPT_WITH_INPUT if context else PROMPT_WITHOUT_INPUT
        messages: list[Message] = [
            {"role": "user", "content": prompt.format(instruction=instruction, input=context)},
            {"role": "assistant", "content": output},
        ]
        return Example(messages, key=json.dumps([instruction, context, output]), origin=record.origin)
