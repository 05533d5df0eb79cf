"""Conversations in the layout of chat interfaces: `{"messages": [{"role": ..., "content": ...}, ...]}`, any turns."""

from __future__ import annotations

import json
from typing import Any, Literal

from tuner.data.dataset import Example, Preparation
from tuner.data.records import Record, json_type, read_records
from tuner.errors import DataError, nearest
from tuner.types import Dataset, Fraction, Message, PositiveInt, Tokenizer

ROLES = ("system", "user", "assistant", "tool")


class Messages:
    """A `DataSource` over one local file; every assistant turn is trained on.

    Args:
        path: a .jsonl file, or a .json file that holds one array.
        val_fraction: share of the distinct conversations that is set aside for validation.
        max_seq_len: tokens of a sample at most.
        too_long: what happens to a longer one.
        max_samples: training conversations at most, None for all.
        max_val_samples: validation conversations at most, None for all that were set aside.
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
        return self.preparation.prepare("messages", examples, tokenizer)


def _example(record: Record) -> Example:
    if "messages" not in record.fields:
        raise DataError(f"{record.origin}: no column 'messages'; found: {', '.join(record.fields) or 'none'}")
    turns = record.fields["messages"]
    if not isinstance(turns, list) or not turns:
        what = "an empty list" if turns == [] else json_type(turns)
        raise DataError(f"{record.origin}: column 'messages' holds {what}, not a list of messages")
    messages = [_message(turn, f"{record.origin}: message {i}") for i, turn in enumerate(turns, start=1)]
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{record.origin}: no message of role 'assistant', so there is nothing to train on")
    return Example(messages, key=json.dumps(messages, sort_keys=True), origin=record.origin)


def _message(turn: Any, origin: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{origin} is {json_type(turn)}, not an object with role and content")
    # Other keys that are set (tool_calls, weight, ...) mean something, and leaving them out would change it
    keys = [key for key, value in turn.items() if value is not None or key in ("role", "content")]
    if sorted(keys) != ["content", "role"]:
        raise DataError(f"{origin} has the keys {', '.join(keys) or 'none'}; it must have role and content alone")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise DataError(f"{origin}: unknown role {role!r}: {nearest(str(role), ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{origin}: content is {json_type(content)}, not a text")
    return {"role": role, "content": content}
