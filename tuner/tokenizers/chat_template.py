"""Chat templates: the Jinja program in a model's folder that writes a conversation as the model was trained to read it.

Templates come with the weights, so they are somebody else's code: they run in `sandbox.Environment`, which gives them
what transformers does: `trim_blocks`, `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now`, a `tojson`
which does not escape HTML, and the `generation` tag.

A template that writes the date would make other data of the same files tomorrow: data is written with `DATE_OF_DATA`,
prompts with today.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from threading import Lock
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from tuner.errors import ModelError
from tuner.tokenizers.bounded_calls import TooLarge, size_of, width_of
from tuner.tokenizers.sandbox import Environment
from tuner.types import Message

DATE_OF_DATA = datetime(2024, 7, 26)
"""What `strftime_now` says while data is prepared: the date that Llama 3.1's template writes where it is told none."""

MAX_SOURCE = 2**17
"""Characters of a template; the longest published are a fifth of it."""

MAX_AROUND = 64
"""Characters that `tojson` may put around each value, indentation of one level included."""

MAX_REASON = 300

# What the expressions of a template can raise: they are compiled to Python's own operations
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: all of it.
        generations: from where to where, in characters, the template's `generation` blocks stand.
    """

    text: str
    generations: Sequence[tuple[int, int]]


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
        self.source, self.origin = source, origin
        # transformers always passes this one, and templates ask whether it is none
        self._variables: dict[str, Any] = {"documents": None, **variables}
        self._knows_calls = "tool_calls" in source
        self._environment = _environment()
        self._one_at_a_time = Lock()  # what the environment counts is of one rendering
        if len(source) > MAX_SOURCE:
            raise ModelError(f"{origin}: the chat template has {len(source):,} characters, more than {MAX_SOURCE:,}")
        try:
            self._template = self._environment.from_string(source)
            self._globals = dict(self._template.globals)
            self._names = jinja2.meta.find_undeclared_variables(self._environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{origin}: the chat template is not valid Jinja, line {error.lineno}: {error}") from error
        except (SyntaxError, *_TEMPLATE_FAILURES) as error:
            raise ModelError(f"{origin}: the chat template is not valid Jinja: {_reason(error)}") from error
        self._marks_replies = self._environment.parse(source).find(jinja2.nodes.CallBlock) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        now: datetime | None = None,
    ) -> Rendered:
        """The conversation as text, with the opening of the assistant's next turn behind it if asked.

        Args:
            messages: the conversation; keys that a message does not have are not defined for the template.
            tools: JSON schemas of what the assistant may call.
            add_generation_prompt: open the assistant's turn.
            now: the time that the template may write; None is the present.

        Raises:
            ModelError: if the template refuses the conversation (as some refuse a system message), fails on it, has no
                place for its tools, or does not end within the limits of `sandbox`.
        """
        self._require_place_for_tools(messages, tools)
        # Fresh plain containers: whatever a template does, it does not reach the caller's messages
        variables = {
            **self._variables,
            "messages": [_plain_message(message) for message in messages],
            "tools": tools and _plain(tools),
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": lambda pattern: _strftime(now, pattern),
        }
        try:
            with self._one_at_a_time:
                return self._rendered(variables)
        except _TEMPLATE_FAILURES as error:
            raise ModelError(
                f"{self.origin}: the chat template fails on {excerpt(messages)}: {_reason(error)}"
            ) from error

    def _rendered(self, variables: dict[str, Any]) -> Rendered:
        environment, template = self._environment, self._template
        environment.begin([variables["messages"], variables["tools"]])
        # As `template.new_context`, which copies the globals from a chain of dictionaries for each conversation
        context = environment.context_class(environment, {**self._globals, **variables}, template.name, template.blocks)
        if not self._marks_replies:
            return Rendered(environment.joined(template.root_render_func(context)), ())
        tag = environment.extensions[_Generation.identifier]
        assert isinstance(tag, _Generation)
        tag.written, tag.spans = 0, []
        pieces = []
        for piece in template.root_render_func(context):
            pieces.append(piece)
            tag.written += len(piece)
        return Rendered(environment.joined(pieces), tag.spans)

    def _require_place_for_tools(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> None:
        """Refuse what a template would leave out without a word."""
        if tools and "tools" not in self._names:
            raise ModelError(f"{self.origin}: the chat template has no place for the tools of {excerpt(messages)}")
        if not self._knows_calls and any(message.get("tool_calls") for message in messages):
            raise ModelError(f"{self.origin}: the chat template has no place for the tool calls in {excerpt(messages)}")


def _plain_message(message: Message) -> dict[str, Any]:
    return {key: value if type(value) is str else _plain(value) for key, value in message.items()}


def _plain(value: Any) -> Any:
    """A copy in Python's own containers."""
    kind = type(value)
    if kind is str or value is None:
        return value
    if isinstance(value, Mapping):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, list | tuple) else value


def _reason(error: BaseException) -> str:
    reason = " ".join(str(error)[: 4 * MAX_REASON].split()) or type(error).__name__
    return reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]} ..."


def excerpt(messages: Sequence[Any]) -> str:
    """A conversation in a few words."""
    if not messages:
        return "an empty conversation"
    start = str(messages[0].get("content"))[:60]
    return f"the conversation ({', '.join(message['role'] for message in messages[:8])}) that starts with {start!r}"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, with which some templates mark replies.

    Its body is a macro that is called at once, as in transformers: what it sets is not seen behind it.

    Attributes:
        written: characters written so far, counted by who renders.
        spans: where the bodies stand.
    """

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.written = 0
        self.spans: list[tuple[int, int]] = []

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.spans.append((self.written, self.written + len(text)))
        return text


def _environment() -> Environment:
    environment = Environment(extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.add_filter("tojson", _tojson, _size_of_json)
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _size_of_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> int:
    around = size_of(list(separators or ())) + (size_of(indent) if isinstance(indent, str) else width_of(indent))
    if around > MAX_AROUND:
        raise TooLarge(f"tojson with {around} characters around each value")
    return size_of(value)


def _strftime(now: datetime | None, pattern: str) -> str:
    if len(pattern) > MAX_AROUND or re.search(r"%[^a-zA-Z%]*\d", pattern):  # which some systems take for a padding
        raise TooLarge(f"strftime_now({pattern[:40]!r})")
    return (now or datetime.now()).strftime(pattern)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
