"""Instructions in the Alpaca layout: objects with `instruction`, `input` (may be empty or absent) and `output`."""

from __future__ import annotations

import json
from typing import Literal

from tuner.data.dataset import Example, Preparation
from tuner.data.records import Record, read_records
from tuner.types import Dataset, Fraction, Message, PositiveInt, Tokenizer

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


class Alpaca:
    """A `DataSource` over one local file; the prompt is the user's message, `output` the reply.

    Args:
        path: a .jsonl file, or a .json file that holds one array.
        val_fraction: share of the distinct examples that is set aside for validation.
        max_seq_len: tokens of a sample at most.
        too_long: what happens to a longer one.
        max_samples: training examples at most, None for all.
        max_val_samples: validation examples at most, None for all that were set aside.
    """

    def __init__(
        self,
        path: str,
        val_fraction: Fraction,
        max_seq_len: PositiveInt,
        too_long: Literal["truncate", "drop", "refuse"],
        max_samples: PositiveInt | None,
        max_val_samples: PositiveInt | None,
    ) -> None:
        self.path = path
        self.preparation = Preparation(val_fraction, max_seq_len, too_long, max_samples, max_val_samples)

    def load(self, tokenizer: Tokenizer) -> Dataset:
        examples = [_example(record) for record in read_records(self.path)]
        return self.preparation.prepare("alpaca", examples, tokenizer)


def _example(record: Record) -> Example:
    instruction, output = record.text("instruction"), record.text("output")
    context = record.text("input") if record.fields.get("input") is not None else ""
    prompt = PROMPT_WITH_INPUT if context else PROMPT_WITHOUT_INPUT
    messages: list[Message] = [
        {"role": "user", "content": prompt.format(instruction=instruction, input=context)},
        {"role": "assistant", "content": output},
    ]
    return Example(messages, key=json.dumps([instruction, context, output]), origin=record.origin)
