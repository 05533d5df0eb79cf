"""What layouts of conversations share: tools, calls of tools, and that there is something to train on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tuner.data.dataset import Example
from tuner.data.records import Record, json_type
from tuner.errors import DataError
from tuner.types import Message


def conversation(record: Record, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> Example:
    """The example that a row's messages and tools make.

    Raises:
        DataError: no assistant speaks.
    """
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{record.origin}: no message of role 'assistant', so there is nothing to train on")
    key = json.dumps([messages, tools] if tools else messages, sort_keys=True)
    return Example(messages, key=key, origin=record.origin, tools=tools)


def text_of(turn: Mapping[str, Any], key: str, origin: str) -> str:
    value = turn.get(key)
    if not isinstance(value, str):
        raise DataError(f"{origin}: {key} is {json_type(value)}, not a text")
    return value


def tools_of(record: Record, column: str | None) -> list[Mapping[str, Any]] | None:
    """The tools of a row, a list of objects or a text that holds one as JSON; None where there are none."""
    value = None if column is None else record.fields.get(column)
    if isinstance(value, str):
        value = _decoded(value, f"{record.origin}: column {column!r}") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{record.origin}: column {column!r} holds {json_type(value)}, not a list of objects")
    return [_without_nulls(tool) for tool in value]


def tool_calls_of(value: Any, origin: str) -> list[dict[str, Any]]:
    """Calls as chat templates take them: the arguments an object, which many files hold as its JSON.

    Raises:
        DataError: no list of `{"function": {"name": ..., "arguments": ...}}`.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{origin}: tool_calls is {'an empty list' if value == [] else json_type(value)}, not a list")
    return [_call(call, f"{origin}: tool call {i}") for i, call in enumerate(value, start=1)]


def _call(call: Any, origin: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise DataError(f'{origin} is not of the form {{"function": {{"name": ..., "arguments": ...}}}}')
    rest = {key: value for key, value in call.items() if key != "function" and value is not None}
    return {"type": "function", **rest, "function": function_of(function, origin)}


def function_of(function: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """`{"name": ..., "arguments": {...}}`.

    Raises:
        DataError: another one, or arguments that are no object.
    """
    name, arguments = text_of(function, "name", origin), function.get("arguments")
    if isinstance(arguments, str):
        arguments = _decoded(arguments, f"{origin}: arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise DataError(f"{origin}: arguments is {json_type(arguments)}, not an object")
    return {"name": name, "arguments": arguments}


def _decoded(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not valid JSON: {error}") from error


def _without_nulls(value: Any) -> Any:
    """Without keys whose value is null: a Parquet column has the keys of all its rows in each."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
