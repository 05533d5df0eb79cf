"""Published templates: text and ids as transformers has them, and exactly the assistant's words trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from tests.tokenizers.published_templates import TEMPLATES
from tuner.errors import ModelError
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.chat_template import DATE_OF_DATA
from tuner.tokenizers.packaged import write_packaged_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter <heute> & morgen",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": ["integer", "null"]}, "hidden": {}},
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "description": "", "parameters": {"properties": {}}}}
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
ASKED = {"role": "user", "content": "Rain?"}
ANSWER = {"role": "tool", "name": "weather", "tool_call_id": "abcdefgh1", "content": "{'rain': 0.2}"}

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one turn": ([{"role": "user", "content": " Hi  "}, {"role": "assistant", "content": " Hello.\n"}], None),
    "a question": ([{"role": "user", "content": "Hi"}], None),
    "three turns": (
        [
            {"role": "user", "content": f"{i} <|im_end|></s>[/INST]"}
            if i % 2 == 0
            else {"role": "assistant", "content": f"no {i}"}
            for i in range(6)
        ],
        None,
    ),
    "system": (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"},
        ],
        None,
    ),
    "thoughts": ([ASKED, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nNo."}], None),
    "tools offered": ([ASKED, {"role": "assistant", "content": "No."}], [WEATHER, TIME]),
    "tool called": (
        [
            ASKED,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            ANSWER,
            {"role": "assistant", "content": "Little."},
        ],
        [WEATHER],
    ),
    "null content": (
        [
            {"role": "system", "content": "S"},
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            ANSWER,
        ],
        [WEATHER],
    ),
    "words and two calls": (
        [ASKED, {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]}, ANSWER, ANSWER],
        [WEATHER, TIME],
    ),
}

Both = tuple[Any, Any]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Both]:
    """Our tokenizer and transformers' of a folder with a template."""
    made: dict[str, Both] = {}

    def of(name: str) -> Both:
        if name not in made:
            kind, template = TEMPLATES[name]
            folder = tmp_path_factory.mktemp("model")
            write_packaged_tokenizer(kind, folder)
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
            made[name] = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        return made[name]

    return of


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_text_and_ids_equal_those_of_transformers(
    template: str, conversation: str, both: Callable[[str], Both]
) -> None:
    ours, reference = both(template)
    messages, tools = CONVERSATIONS[conversation]
    for prompt in (False, True):
        settings = {"tools": tools, "add_generation_prompt": prompt}
        text, refusal = _reference(reference, messages, settings)
        if refusal:
            with pytest.raises(ModelError) as raised:
                ours.render_chat(messages, **settings)
            assert refusal[:200] in str(raised.value) or "has no place for" in str(raised.value)
            continue
        if silent := _left_out(template, messages, tools):
            with pytest.raises(ModelError, match=f"has no place for the {silent}"):
                ours.render_chat(messages, **settings)
            continue
        assert ours.render_chat(messages, **settings) == text
        ids = reference.apply_chat_template(
            messages, tokenize=True, return_dict=False, sanitize_control_tokens=True, **settings
        )
        assert ours.apply_chat_template(messages, **settings) == ids


def _reference(reference: Any, messages: Any, settings: dict[str, Any]) -> tuple[str, str]:
    """transformers' text, or why it has none."""
    try:
        return reference.apply_chat_template(messages, tokenize=False, **settings), ""
    except (TemplateError, TypeError) as error:
        return "", " ".join(str(error).split())


def _left_out(template: str, messages: list[dict[str, Any]], tools: Any) -> str:
    """What transformers leaves out without a word, and is refused here."""
    if tools and "tools" not in TEMPLATES[template][1]:
        return "tools"
    return ""


def test_the_templates_cover_what_they_are_to(both: Callable[[str], Both]) -> None:
    """Not everything is refused: each template writes a conversation, and five of them tools and calls."""
    written: dict[str, list[str]] = {name: [] for name in TEMPLATES}
    for name in TEMPLATES:
        for conversation, (messages, tools) in CONVERSATIONS.items():
            try:
                both(name)[0].render_chat(messages, tools=tools)
            except ModelError:
                continue
            written[name].append(conversation)
    assert all({"one turn", "a question", "three turns"} <= set(found) for found in written.values())
    assert sum("tool called" in found for found in written.values()) == 5
    assert sum("null content" in found for found in written.values()) == 5


ZURICH = '{"city": "Zürich"}'
CALLED = {
    "Llama 3.1": ['{"name": "weather", "parameters": ' + ZURICH + "}<|eot_id|>", "Little.<|eot_id|>"],
    "Mistral with tools": [
        '[TOOL_CALLS] [{"name": "weather", "arguments": ' + ZURICH + ', "id": "abcdefgh1"}]</s>',
        "Little.</s>",
    ],
    "Qwen2.5": [
        '<tool_call>\n{"name": "weather", "arguments": ' + ZURICH + "}\n</tool_call><|im_end|>",
        "Little.<|im_end|>",
    ],
    "Qwen3": [
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": ' + ZURICH + "}\n</tool_call><|im_end|>",
        "<think>\n\n</think>\n\nLittle.<|im_end|>",
    ],
    "macros and generation blocks": ['!weather{\n  "city": "Zürich"\n}<|im_end|>', "Little.<|im_end|>"],
}


def _trained(tokenizer: Any, ids: list[int], mask: list[bool]) -> list[str]:
    """The stretches that are trained on, as text."""
    found: list[str] = []
    run: list[int] = []
    for id_, trained in [*zip(ids, mask, strict=True), (0, False)]:
        if trained:
            run.append(id_)
        elif run:
            found.append(tokenizer.decode(run).strip())
            run = []
    return found


@pytest.mark.parametrize("template", CALLED)
def test_calls_of_tools_are_replies(template: str, both: Callable[[str], Both]) -> None:
    ours, _ = both(template)
    messages, tools = CONVERSATIONS["tool called"]
    if template == "Qwen3":  # which leaves the empty thought of the first away once the second is there
        with pytest.raises(ModelError, match="writes earlier turns differently once others follow"):
            ours.encode_chat(messages, tools=tools)
        assert _trained(ours, *ours.encode_chat(messages[:2], tools=tools)) == CALLED[template][:1]
        last = ours.encode_chat(messages, tools=tools, last_reply_only=True)
        assert _trained(ours, *last) == CALLED[template][1:]
    else:
        ids, mask = ours.encode_chat(messages, tools=tools)
        assert _trained(ours, ids, mask) == CALLED[template]
        assert _trained(ours, *ours.encode_chat(messages, tools=tools, last_reply_only=True)) == CALLED[template][1:]


ENDS = {
    "Llama 2": "</s>",
    "Mistral": "</s>",
    "Mistral with tools": "</s>",
    "Gemma": "<end_of_turn>",
    "Phi-3": "<|end|>",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_exactly_the_replies_are_trained_whatever_users_write(template: str, both: Callable[[str], Both]) -> None:
    ours, _ = both(template)
    ids, mask = ours.encode_chat(CONVERSATIONS["three turns"][0])
    end = ENDS.get(template, "<|eot_id|>" if "Llama 3" in template else "<|im_end|>")
    expected = [f"no {i}{' ' * (template == 'Llama 2')}{end}" for i in (1, 3, 5)]
    if template == "Qwen3":
        expected[-1] = f"<think>\n\n</think>\n\n{expected[-1]}"
    assert _trained(ours, ids, mask) == expected


def test_generation_blocks_say_what_transformers_masks_say(both: Callable[[str], Both]) -> None:
    ours, reference = both("macros and generation blocks")
    for messages, tools in CONVERSATIONS.values():
        expected = reference.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = ours.encode_chat(messages, tools=tools)
        if ids == expected["input_ids"]:  # else a user wrote a control token
            assert mask == list(map(bool, expected["assistant_masks"]))
        else:
            assert messages is CONVERSATIONS["three turns"][0]


def test_data_has_the_same_ids_on_every_day_and_prompts_have_today(both: Callable[[str], Both]) -> None:
    ours, _ = both("Llama 3.1")
    messages = CONVERSATIONS["one turn"][0]
    encoded = ours.encode_chat(messages)
    assert f"Today Date: {DATE_OF_DATA:%d %b %Y}\n" in ours.decode(encoded[0])
    today = ours.render_chat(messages)
    assert f"Today Date: {DATE_OF_DATA:%d %b %Y}\n" not in today
    shown = ours.decode(ours.apply_chat_template(messages, add_generation_prompt=True))
    assert shown.startswith(today.removesuffix("\n")[: today.index("<|eot_id|>")])
