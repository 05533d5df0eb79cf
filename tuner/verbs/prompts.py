"""The prompts of `tuner generate`: one on the command line, or a file of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.data.conversation import tools_of
from tuner.data.messages import message_of
from tuner.data.records import Record
from tuner.errors import ConfigError, DataError
from tuner.types import Message, Tools


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        where: what messages call it.
        row: what stands in the file: shown again beside the reply, whatever further keys it has.
        text: continued as it is, where `messages` is None.
        messages: a conversation, through the chat template.
        tools: what the assistant may call in it, a JSON schema for each.
    """

    where: str
    row: Mapping[str, Any]
    text: str
    messages: Sequence[Message] | None
    tools: Tools | None = None


def prompts_of(prompt: str | None, file: str | None, system: str | None, *, chat: bool) -> list[Prompt]:
    """The one prompt, or those of a file: a prompt a line, or in a `.jsonl` an object with `prompt`, or with `messages`
    (as `data=messages` reads them) and perhaps `tools`.

    Args:
        prompt: text.
        file: its path; blank lines are left out.
        system: message that goes before conversations which have none.
        chat: prompts are what a user says; False continues them as they are.

    Raises:
        ConfigError: neither or both, or a system message where there is no conversation.
        DataError: a file that cannot be read, with the line.
    """
    if (prompt is None) == (file is None):
        raise ConfigError("say prompt=TEXT, or prompts=FILE for a file of them; one of the two")
    if system is not None and not chat:
        raise ConfigError(f"system={system} chat=false: without a chat there is no system message; leave one out")
    if prompt is not None:
        return [_prompt("prompt", {"prompt": prompt}, system, chat)]
    path = Path(str(file)).expanduser()
    prompts = [_prompt(where, row, system, chat) for where, row in _rows(path)]
    if not prompts:
        raise DataError(f"prompts={file}: no prompt in it")
    return prompts


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts={path}: cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _object(where, line) if path.suffix == ".jsonl" else {"prompt": line.removesuffix("\r")}


def _object(where: str, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise DataError(f"{where}: expected an object with prompt, or with messages")
    return row


def _prompt(where: str, row: Mapping[str, Any], system: str | None, chat: bool) -> Prompt:
    if "messages" in row and not chat:
        raise DataError(f"{where}: messages are a conversation, and chat=false continues texts as they are")
    record = Record(dict(row), where)
    messages = _messages(record) if "messages" in row else None
    tools = tools_of(record, "tools")
    if tools and not chat:
        raise DataError(f"{where}: tools are offered in a conversation, and chat=false continues texts as they are")
    text = row.get("prompt", "")
    if not isinstance(text, str):
        raise DataError(f"{where}: prompt={text!r}: expected text")
    if chat and messages is None:
        messages = [{"role": "user", "content": text}]
    if messages is not None and system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Prompt(where, row, text, messages, tools)


def _messages(record: Record) -> list[Message]:
    turns = record.list_of("messages", "messages")
    messages = [message_of(turn, f"{record.origin}: message {i}") for i, turn in enumerate(turns, start=1)]
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{record.origin}: the last of messages is the assistant's, so no reply is asked for")
    return messages
