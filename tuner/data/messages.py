"""Conversations in the layout of chat interfaces: `[{"role": ..., "content": ...}, ...]`, any turns, with tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tuner.data.conversation import conversation, text_of, tool_calls_of, tools_of
from tuner.data.dataset import Example
from tuner.data.layout import Layout
from tuner.data.records import Record, json_type
from tuner.errors import DataError, nearest
from tuner.types import Message

ROLES = ("system", "user", "assistant", "tool")
OPTIONAL = {"tool_calls": ("assistant",), "tool_call_id": ("tool",), "name": ROLES}
"""Keys of a message beside role and content, and the roles that may have them."""


@dataclass(frozen=True)
class Messages(Layout):
    """Every assistant turn is trained on.

    Args:
        messages_column: the conversations.
        tools_column: what the assistant may call, a list or its JSON; a row may lack it. None reads no such column.
    """

    messages_column: str
    tools_column: str | None

    name: ClassVar = "messages"

    def example_of(self, record: Record) -> Example:
        turns = record.list_of(self.messages_column, "messages")
        messages = [message_of(turn, f"{record.origin}: message {i}") for i, turn in enumerate(turns, start=1)]
        return conversation(record, messages, tools_of(record, self.tools_column))


def message_of(turn: Any, origin: str) -> Message:
    """One turn of a conversation.

    Raises:
        DataError: naming `origin` and what is wrong with it.
    """
    if not isinstance(turn, dict):
        raise DataError(f"{origin} is {json_type(turn)}, not an object with role and content")
    # Other keys that are set (weight, refusal, ...) mean something, and leaving them out would change it
    keys = [key for key, value in turn.items() if value is not None or key in ("role", "content")]
    calls = "tool_calls" in keys
    if not {"role"} <= set(keys) <= {"role", "content", *OPTIONAL} or ("content" not in keys and not calls):
        raise DataError(
            f"{origin} has the keys {', '.join(keys) or 'none'}; it must have role and content, and may have "
            f"{', '.join(OPTIONAL)}"
        )
    role = turn["role"]
    if role not in ROLES:
        raise DataError(f"{origin}: unknown role {role!r}: {nearest(str(role), ROLES)}")
    for key in [key for key in keys if role not in OPTIONAL.get(key, ROLES)]:
        raise DataError(f"{origin}: role {role!r} has {key}, which is for {OPTIONAL[key][0]!r}")
    content = turn.get("content")
    message: Message = {"role": role, "content": "" if content is None and calls else text_of(turn, "content", origin)}
    if calls:
        message["tool_calls"] = tool_calls_of(turn["tool_calls"], origin)
    if "name" in keys:
        message["name"] = text_of(turn, "name", origin)
    if "tool_call_id" in keys:
        message["tool_call_id"] = text_of(turn, "tool_call_id", origin)
    return message
