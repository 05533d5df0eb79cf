"""What each layout makes of a row, and one clear sentence for each row that is none of its own."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.utils import instantiate

from tuner.config import compose
from tuner.data.dataset import Example
from tuner.data.layout import Layout
from tuner.data.records import Record
from tuner.errors import DataError

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


@cache
def layout(name: str, *words: str) -> Layout:
    made = instantiate(compose([f"data={name}", "data.path=nowhere.jsonl", *words]).data)
    assert isinstance(made, Layout)
    return made


def example(name: str, fields: dict[str, Any], *words: str) -> Example:
    return layout(name, *words).example_of(Record(fields, "FILE:1"))


def said(name: str, fields: dict[str, Any], *words: str) -> str:
    with pytest.raises(DataError) as raised:
        example(name, fields, *words)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_alpaca_s_columns_have_any_names() -> None:
    own = example("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"})
    words = ["data.instruction_column=do", "data.input_column=with", "data.output_column=is"]
    assert example("alpaca", {"do": "Add.", "with": "1 2", "is": "3", "id": 7}, *words) == own
    without = example("alpaca", {"instruction": "Add.", "output": "3"})
    assert example("alpaca", {"instruction": "Add.", "input": None, "output": "3"}) == without != own
    assert (
        example("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, "data.input_column=null") == without
    )
    assert said("alpaca", {"instruction": "Add.", "output": "3"}, *words) == (
        "FILE:1: no column 'do'; found: instruction, output"
    )


def test_instruct_takes_any_two_columns_and_a_third() -> None:
    fields = {"question": "1 + 2?", "answer": "3", "rules": "Be short."}
    words = ["data.prompt_column=question", "data.response_column=answer"]
    turns = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]
    assert example("instruct", fields, *words).messages == turns
    with_system = example("instruct", fields, *words, "data.system_column=rules")
    assert with_system.messages == [{"role": "system", "content": "Be short."}, *turns]
    assert with_system.key != example("instruct", fields, *words).key
    for nothing in ("", None):
        fields["rules"] = nothing
        assert example("instruct", fields, *words, "data.system_column=rules").messages == turns
    assert said("instruct", fields) == "FILE:1: no column 'prompt'; found: question, answer, rules"
    assert "no column 'rule'; found: question" in said("instruct", fields, *words, "data.system_column=rule")
    assert said("instruct", {**fields, "answer": 3}, *words) == "FILE:1: column 'answer' holds a number, not a text"


@pytest.mark.parametrize("chunk", [True, False])
def test_a_text_is_an_example_without_messages(chunk: bool) -> None:
    found = example("text", {"body": "Once upon"}, "data.text_column=body", f"data.chunk={chunk}")
    assert found == Example([], key="Once upon", origin="FILE:1", text="Once upon", chunk=chunk)
    assert said("text", {"body": "Once"}) == "FILE:1: no column 'text'; found: body"


CONVERSATION = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "1 + 2?", "name": "Ann"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
    {"role": "assistant", "content": "It is 3."},
]


def test_messages_keep_tools_and_their_calls() -> None:
    found = example("messages", {"messages": CONVERSATION, "tools": [TOOL]})
    assert (found.messages, found.tools) == (CONVERSATION, [TOOL])
    assert example("messages", {"messages": CONVERSATION}).tools is None
    assert example("messages", {"messages": CONVERSATION, "tools": [TOOL]}, "data.tools_column=null").tools is None
    assert example("messages", {"turns": CONVERSATION}, "data.messages_column=turns").messages == CONVERSATION
    keys = {example("messages", {"messages": CONVERSATION, "tools": tools}).key for tools in (None, [], [TOOL])}
    assert len(keys) == 2


def test_tools_and_arguments_may_be_written_as_json() -> None:
    call = {**CALL, "function": {"name": "add", "arguments": json.dumps(CALL["function"]["arguments"])}}  # type: ignore[index]
    turns = [*CONVERSATION[:2], {"role": "assistant", "content": None, "tool_calls": [call]}, *CONVERSATION[3:]]
    found = example("messages", {"messages": turns, "tools": json.dumps([TOOL])})
    assert found == example("messages", {"messages": CONVERSATION, "tools": [TOOL]})
    without = {"function": {"name": "now", "arguments": ""}}
    calls = example("messages", {"messages": [{"role": "assistant", "tool_calls": [without]}]}).messages[0][
        "tool_calls"
    ]
    assert calls == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


def test_a_parquet_file_puts_every_key_in_every_message_and_means_nothing_by_it(tmp_path: Path) -> None:
    turns = json.loads(json.dumps(CONVERSATION))
    rows = [
        {"messages": turns, "tools": [TOOL]},
        {"messages": [{"role": "assistant", "content": "Hi."}], "tools": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    first, second = layout("messages", f"data.path={tmp_path}/data.parquet").examples()
    assert first.messages == CONVERSATION
    assert (second.messages, second.tools) == (rows[1]["messages"], None)


TURNS = {
    "a text": ({"role": "assistant", "content": ["a"]}, "content is a list, not a text"),
    "calls of a user": (
        {"role": "user", "content": "a", "tool_calls": [CALL]},
        "role 'user' has tool_calls, which is for 'assistant'",
    ),
    "an answer of a user": (
        {"role": "user", "content": "a", "tool_call_id": "x"},
        "role 'user' has tool_call_id, which is for 'tool'",
    ),
    "no calls": ({"role": "assistant", "content": "a", "tool_calls": []}, "tool_calls is an empty list, not a list"),
    "calls in a text": ({"role": "assistant", "tool_calls": "a"}, "tool_calls is a text, not a list"),
    "a call without function": (
        {"role": "assistant", "tool_calls": [{"name": "add"}]},
        'tool call 1 is not of the form {"function": {"name": ..., "arguments": ...}}',
    ),
    "a call without a name": (
        {"role": "assistant", "tool_calls": [CALL, {"function": {"arguments": {}}}]},
        "tool call 2: name is null, not a text",
    ),
    "arguments in a list": (
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "[1]"}}]},
        "tool call 1: arguments is a list, not an object",
    ),
    "arguments that are no JSON": (
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{oops"}}]},
        "tool call 1: arguments: not valid JSON: Expecting property name",
    ),
    "an empty message": ({"role": "assistant"}, "has the keys role; it must have role and content, and may have"),
    "a developer": ({"role": "developer", "content": "a"}, "unknown role 'developer': valid: assistant, system, tool,"),
    "a role in a list": ({"role": ["user"], "content": "a"}, "unknown role ['user']"),
}


@pytest.mark.parametrize(("turn", "part"), TURNS.values(), ids=TURNS)
def test_messages_that_are_none(turn: dict[str, Any], part: str) -> None:
    sentence = said("messages", {"messages": [{"role": "assistant", "content": "ok"}, turn]})
    assert sentence.startswith("FILE:1: message 2")
    assert part in sentence


def test_tools_that_are_none() -> None:
    for tools, part in {"[": "not valid JSON: Expecting value", '"a"': "holds a text, not a list of objects"}.items():
        assert part in said("messages", {"messages": CONVERSATION, "tools": tools})
    assert said("messages", {"messages": CONVERSATION, "tools": {"a": 1}}) == (
        "FILE:1: column 'tools' holds an object, not a list of objects"
    )


def test_sharegpt_says_the_same_as_messages() -> None:
    turns = [
        {"from": "system", "value": "Use tools."},
        {"from": "human", "value": "1 + 2?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3.", "weight": None},
    ]
    call = {"type": "function", "function": CALL["function"]}
    messages = [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    found = example("sharegpt", {"conversations": turns, "tools": json.dumps([TOOL])})
    assert found == example("messages", {"messages": messages, "tools": [TOOL]})
    beside = example("sharegpt", {"talk": turns[1:], "system": "Use tools."}, "data.conversations_column=talk")
    assert beside.messages == messages
    assert example("sharegpt", {"conversations": turns[1:], "system": None}).messages == messages[1:]
    twice = {"conversations": [turns[2], *turns[2:]]}
    twice["conversations"][0] = {"from": "function_call", "value": json.dumps([CALL["function"], CALL["function"]])}
    assert example("sharegpt", twice).messages[0]["tool_calls"] == [call, call]


SHAREGPT = {
    "unknown": ({"from": "gtp", "value": "a"}, "turn 1: unknown role 'gtp': did you mean gpt?"),
    "other keys": ({"role": "user", "content": "a"}, "turn 1 has the keys role, content; it must have from and value"),
    "not a turn": ("hi", "turn 1 is a text, not an object with from and value"),
    "no text": ({"from": "gpt", "value": None}, "turn 1: value is null, not a text"),
    "call": ({"from": "function_call", "value": "add(1)"}, "turn 1: value of a function_call is not valid JSON"),
    "call of nothing": ({"from": "function_call", "value": "[]"}, "turn 1: a function_call is a list, not an object"),
    "call without name": ({"from": "function_call", "value": "{}"}, "turn 1: name is null, not a text"),
    "nobody replies": ({"from": "human", "value": "a"}, "no message of role 'assistant', so there is nothing to train"),
}


@pytest.mark.parametrize(("turn", "part"), SHAREGPT.values(), ids=SHAREGPT)
def test_turns_that_are_none(turn: Any, part: str) -> None:
    assert said("sharegpt", {"conversations": [turn]}).startswith(f"FILE:1: {part}")


def test_a_system_message_is_said_once() -> None:
    turns = [{"from": "system", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert said("sharegpt", {"conversations": turns, "system": "c"}) == (
        "FILE:1: a system message in column 'system' and one in turn 1"
    )


def test_a_file_of_its_own_is_what_is_validated_on(tmp_path: Path) -> None:
    for name, number in (("train", 3), ("val", 2)):
        (tmp_path / f"{name}.csv").write_text("text\n" + "".join(f"{name} {i}\n" for i in range(number)))
    data = layout("text", f"data.path={tmp_path}/train.csv", f"data.val_path={tmp_path}/val.csv")
    validation = data.validation_examples()
    assert validation is not None
    assert [found.text for found in data.examples()] == ["train 0", "train 1", "train 2"]
    assert [found.text for found in validation] == ["val 0", "val 1"]
    assert (data.examples().name, validation.name) == ("text", "text: validation")
    assert layout("text").validation_examples() is None
