"""Conversations in the layout of ShareGPT: `[{"from": ..., "value": ...}, ...]`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from tuner.data.conversation import conversation, function_of, text_of, tools_of
from tuner.data.dataset import Example
from tuner.data.layout import Layout
from tuner.data.records import Record, json_type
from tuner.errors import DataError, nearest
from tuner.types import Message

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class ShareGPT(Layout):
    """Every turn of gpt is trained on, and so are calls of tools.

    Args:
        conversations_column: the conversations.
        system_column: texts of system messages; a row may lack it. None reads no such column.
        tools_column: what the assistant may call, a list or its JSON; a row may lack it. None reads no such column.
    """

    conversations_column: str
    system_column: str | None
    tools_column: str | None

    name: ClassVar = "sharegpt"

    def example_of(self, record: Record) -> Example:
        turns = record.list_of(self.conversations_column, "turns")
        messages = [_message(turn, f"{record.origin}: turn {i}") for i, turn in enumerate(turns, start=1)]
        if system := record.text_if_any(self.system_column):
            if messages[0]["role"] == "system":
                raise DataError(f"{record.origin}: a system message in column {self.system_column!r} and one in turn 1")
            messages = [{"role": "system", "content": system}, *messages]
        return conversation(record, messages, tools_of(record, self.tools_column))


def _message(turn: Any, origin: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{origin} is {json_type(turn)}, not an object with from and value")
    # Other keys that are set (weight, ...) mean something, and leaving them out would change it
    keys = [key for key, value in turn.items() if value is not None or key in ("from", "value")]
    if sorted(keys) != ["from", "value"]:
        raise DataError(f"{origin} has the keys {', '.join(keys) or 'none'}; it must have from and value alone")
    speaker, value = turn["from"], text_of(turn, "value", origin)
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise DataError(f"{origin}: unknown role {speaker!r}: {nearest(str(speaker), ROLES)}")
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, origin)}
    return {"role": ROLES[speaker], "content": value}


def _calls(value: str, origin: str) -> list[dict[str, Any]]:
    """The calls that a text holds as JSON: one `{"name": ..., "arguments": {...}}`, or a list of them."""
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: value of a function_call is not valid JSON: {error}") from error
    calls = found if isinstance(found, list) and found else [found]
    for call in calls:
        if not isinstance(call, dict):
            raise DataError(f"{origin}: a function_call is {json_type(call)}, not an object with name and arguments")
    return [{"type": "function", "function": function_of(call, origin)} for call in calls]
