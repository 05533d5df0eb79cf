"""What `tuner generate` is asked: one prompt, a text file with one a line, or a .jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuner.errors import DataError, TunerError
from tuner.verbs.prompts import prompts_of


def test_one_prompt_is_what_a_user_says_or_a_text_to_continue() -> None:
    (said,) = prompts_of(" hi\n", None, None, chat=True)
    assert (said.where, said.messages) == ("prompt", [{"role": "user", "content": " hi\n"}])
    (text,) = prompts_of(" hi\n", None, None, chat=False)
    assert (text.text, text.messages) == (" hi\n", None)


def test_a_text_file_has_a_prompt_a_line_without_the_blank_ones(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes('first\r\n\n  \n{"prompt": 1}\n third \x0c\u2028still'.encode())
    found = prompts_of(None, str(file), None, chat=False)
    assert [prompt.text for prompt in found] == ["first", '{"prompt": 1}', " third \x0c\u2028still"]
    assert [prompt.where for prompt in found] == [f"{file}:{line}" for line in (1, 4, 5)]


def test_a_jsonl_keeps_its_keys_and_gets_the_system_message_where_it_has_none(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "id": 7},
        {"messages": [{"role": "user", "content": "b"}]},
        {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "c"}], "more": [1]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    found = prompts_of(None, str(file), "be brief", chat=True)
    assert [prompt.row for prompt in found] == rows
    assert [[message["content"] for message in prompt.messages or ()] for prompt in found] == [
        ["be brief", "a"],
        ["be brief", "b"],
        ["own", "c"],
    ]


def test_tools_and_their_answers_are_part_of_a_conversation(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "add 1"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "name": "add"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"messages": turns, "tools": tools}, {"prompt": "hi", "tools": tools}])))
    asked, said = prompts_of(None, str(file), None, chat=True)
    assert (asked.tools, said.tools) == (tools, tools)
    assert said.messages == [{"role": "user", "content": "hi"}]
    assert asked.messages is not None
    assert [message["role"] for message in asked.messages] == ["user", "assistant", "tool"]
    assert asked.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    file.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "hi", "tools": tools}))
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: tools are offered in a conversation"):
        prompts_of(None, str(file), None, chat=False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no prompt in it"),
        (b"\n\n", "no prompt in it"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (b'{"prompt": "a"}\n{"prompt": ', r"prompts.jsonl:2: not JSON"),
        (b'["a"]', "expected an object with prompt, or with messages"),
        (b'{"text": "a"}', "expected an object with prompt, or with messages"),
        (b'{"prompt": "a", "messages": []}', "expected an object with prompt, or with messages"),
        (b'{"prompt": 3}', "prompts.jsonl:1: prompt=3: expected text"),
        (b'{"messages": []}', "prompts.jsonl:1: column 'messages' holds an empty list"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "prompts.jsonl:1: message 1: unknown role 'robot'"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "the last of messages is the assistant's"),
        (b'{"prompt": "a", "tools": [1]}', "column 'tools' holds a list, not a list of objects"),
    ],
)
def test_a_file_that_is_no_prompts_is_refused_with_the_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=said):
        prompts_of(None, str(file), None, chat=True)


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "b"}]}')
    for given, said in [
        ({"prompt": "a", "file": str(file), "system": None, "chat": True}, "one of the two"),
        ({"prompt": None, "file": None, "system": None, "chat": True}, "one of the two"),
        ({"prompt": "a", "file": None, "system": "b", "chat": False}, "there is no system message"),
        ({"prompt": None, "file": str(file), "system": None, "chat": False}, "chat=false continues texts"),
        ({"prompt": None, "file": str(tmp_path), "system": None, "chat": True}, "cannot be read"),
    ]:
        with pytest.raises(TunerError, match=said):
            prompts_of(**given)  # type: ignore[arg-type]
