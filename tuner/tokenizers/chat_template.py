"""Chat templates: the Jinja program in a model's folder that writes a conversation as the model was trained to read it.

Templates come with the weights, so they are somebody else's code: they run in Jinja's immutable sandbox, in an
environment equal to the one transformers gives them: `trim_blocks`, `lstrip_blocks`, loop controls, `raise_exception`,
`strftime_now`, a `tojson` which does not escape HTML, and the `generation` tag, whose body is rendered as it is.

What the assistant wrote is found by rendering, not by searching for a marker such as `<|im_start|>assistant`: markers
differ from model to model, occur in user text, and may be tokenized differently from place to place. The conversation
up to a reply, rendered with the prompt that asks for it, must be a prefix of the conversation with the reply.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tuner.errors import ModelError
from tuner.types import Message

# What the expressions of a template can raise: they are compiled to Python's own operations
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class ReplySpan:
    """Where one reply stands in the rendered conversation, in characters.

    Attributes:
        start: the first character the model writes.
        content_end: behind the last character of the message's own text.
        stop: behind the last character that the template wrote because of this message.
    """

    start: int
    content_end: int
    stop: int


class ChatTemplate:
    """One compiled template.

    Args:
        source: the Jinja text.
        variables: what it sees besides the messages, as `bos_token` and `eos_token`.
        origin: file or folder it came from, for messages.

    Raises:
        ModelError: if the template is not valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str], origin: str) -> None:
        self.origin = origin
        # transformers always passes these two, and templates ask whether they are none
        self._variables: dict[str, Any] = {"tools": None, "documents": None, **variables}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{origin}: the chat template is not valid Jinja, line {error.lineno}: {error}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text, with the opening of the assistant's next turn behind it if asked.

        Raises:
            ModelError: if the template refuses the conversation (as some refuse a system message) or fails on it.
        """
        # Fresh plain dicts: whatever a template does, it does not reach the caller's messages
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **self._variables)
        except _TEMPLATE_FAILURES as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{self.origin}: the chat template fails on {_excerpt(plain)}: {reason}") from error

    def render_with_replies(self, messages: Sequence[Message]) -> tuple[str, list[ReplySpan]]:
        """The whole conversation as text, and where each assistant message stands in it.

        Raises:
            ModelError: if the template writes a turn differently once others follow, so that it cannot be masked.
        """
        text = self.render(messages)
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._reply_span(text, messages, i) for i in replies]

    def _reply_span(self, text: str, messages: Sequence[Message], i: int) -> ReplySpan:
        prompt = self.render(messages[:i], add_generation_prompt=True)
        turn = text if i + 1 == len(messages) else self.render(messages[: i + 1])
        if not (text.startswith(prompt) and text.startswith(turn)):
            raise ModelError(
                f"{self.origin}: replies of {_excerpt(messages)} cannot be told from the rest: the chat template"
                " writes earlier turns differently once others follow; give one reply per example or another template"
            )
        start, stop = len(prompt), len(turn)
        content_start, content_end = self._find_content(text[start:stop], messages[i]["content"])
        if content_start and prompt == self.render(messages[:i]):
            # The template knows no generation prompt: what precedes the content is a header nobody has to write
            start += content_start
            content_end -= content_start
        return ReplySpan(start, start + content_end, stop)

    def _find_content(self, turn: str, content: str) -> tuple[int, int]:
        """Where the message's text starts and ends within its turn; many templates trim it first."""
        for written in (content, content.strip()):
            at = turn.find(written)
            if at >= 0:
                return at, at + len(written)
        raise ModelError(
            f"{self.origin}: the chat template rewrites the reply {content[:60]!r}, so it cannot be told from the rest"
        )


def _excerpt(messages: Sequence[Any]) -> str:
    if not messages:
        return "an empty conversation"
    start = str(messages[0]["content"])[:60]
    return f"the conversation ({', '.join(message['role'] for message in messages[:8])}) that starts with {start!r}"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, with which some templates mark replies: its body, unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
