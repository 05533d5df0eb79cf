"""Where in a rendered conversation the assistant's words are, and those of messages that look like control tokens.

Found by rendering, not by searching for a marker such as `<|im_start|>assistant`: markers differ from model to model,
occur in user text, and may be tokenized differently from place to place. A template with `generation` blocks says it
itself. Otherwise the conversation up to a reply, rendered with the prompt that asks for it, must be a prefix of the
whole, and so must the conversation with the reply; where a template writes a turn otherwise once others follow (Qwen3's
empty thoughts, Phi-3's end of the text), the reply is looked up by two characters around it that occur in no message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from os.path import commonprefix
from typing import Any

from tuner.errors import ModelError
from tuner.tokenizers.added_tokens import any_of
from tuner.tokenizers.chat_template import ChatTemplate, Rendered, excerpt
from tuner.types import Message

SEQUENCES = (list, tuple)  # named here: a union that stands in an expression is made anew each time


@dataclass(frozen=True)
class ReplySpan:
    """Where one reply stands in the rendered conversation, in characters.

    Attributes:
        start: the first character the model writes.
        content_end: behind the last character of the message's own text.
        stop: behind the last character that the template wrote because of this message.
        whole: the turn holds more than text, as calls of tools: its last control token ends it and not the first.
        exact: the template itself says where it stops; a token belongs to it that holds its last character.
    """

    start: int
    content_end: int
    stop: int
    whole: bool = False
    exact: bool = False


class Conversation:
    """A conversation and how a template writes it.

    Args:
        template: writes it.
        messages: its turns.
        tools: JSON schemas of what the assistant may call.
        now: as for `ChatTemplate.render`.

    Raises:
        ModelError: as `ChatTemplate.render`.
    """

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        now: datetime | None = None,
    ) -> None:
        self._template, self.messages, self._tools, self._now = template, messages, tools, now
        self._opens = add_generation_prompt
        self._rendered = self._render(messages, add_generation_prompt=add_generation_prompt)
        self.text = self._rendered.text

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Rendered:
        return self._template.render(
            messages, tools=self._tools, add_generation_prompt=add_generation_prompt, now=self._now
        )

    def replies(self, *, last_only: bool = False) -> list[ReplySpan]:
        """Where each assistant message stands, or the last one.

        Raises:
            ModelError: if the template writes a turn so differently once others follow that it cannot be found.
        """
        if self._rendered.generations:
            spans = self._rendered.generations[-1:] if last_only else self._rendered.generations
            return [ReplySpan(start, stop, stop, exact=True) for start, stop in spans if start < stop]
        which = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return [self._reply(i) for i in (which[-1:] if last_only else which)]

    def written_by_messages(self, words: Sequence[str]) -> list[tuple[int, int]]:
        """Where in the text, in characters, words stand that a message or a tool wrote and not the template.

        Rendered again with marks around them, two characters that occur in no message; without the marks it has to be
        the same text.

        Raises:
            ModelError: if the template looks at the words itself, so that they cannot be told from its own.
        """
        opened, closed = _unused(self.text, self.messages, self._tools)
        pattern = any_of(words)
        marked = self._template.render(
            _mapped(self.messages, lambda text: pattern.sub(rf"{opened}\g<0>{closed}", text)),
            tools=_mapped(self._tools, lambda text: pattern.sub(rf"{opened}\g<0>{closed}", text)),
            add_generation_prompt=self._opens,
            now=self._now,
        ).text
        if marked.replace(opened, "").replace(closed, "") != self.text:
            raise ModelError(
                f"{self._template.origin}: the chat template treats special tokens in {excerpt(self.messages)} as its"
                " own, so they cannot be kept apart from those that it writes"
            )
        ranges, removed = [], 0
        for found in re.finditer(f"{opened}({pattern.pattern}){closed}|[{opened}{closed}]", marked):
            if found[1]:  # else the template has cut a word off, and one mark is left
                ranges.append((found.start() - removed, found.start() - removed + len(found[1])))
            removed += len(found[0]) - len(found[1] or "")
        return ranges

    def _reply(self, i: int) -> ReplySpan:
        prompt = self._render(self.messages[:i], add_generation_prompt=True).text
        turn = self.text if i + 1 == len(self.messages) else self._render(self.messages[: i + 1]).text
        if not self.text.startswith(prompt):
            raise self._rewritten()
        start, content = len(prompt), self.messages[i].get("content") or ""
        if not self.text.startswith(turn):
            return self._marked_reply(i, start)
        stop = len(turn)
        if self.messages[i].get("tool_calls"):
            return ReplySpan(start, start, stop, whole=True)
        content_start, content_end = self._find_content(self.text[start:stop], content)
        if content_start and prompt == self._render(self.messages[:i]).text:
            # The template knows no generation prompt: what precedes the content is a header nobody has to write
            start += content_start
            content_end -= content_start
        return ReplySpan(start, start + content_end, stop)

    def _marked_reply(self, i: int, start: int) -> ReplySpan:
        """A reply that is written otherwise once others follow, found by marks around its text.

        What the template writes because of it is what stands behind it both there and where it is the last.
        """
        content = self.messages[i].get("content")
        if not content or self.messages[i].get("tool_calls"):
            raise self._rewritten()
        opened, closed = _unused(self.text, self.messages, self._tools)
        marked: Message = {**self.messages[i], "content": f"{opened}{content}{closed}"}
        whole = self._render([*self.messages[:i], marked, *self.messages[i + 1 :]], add_generation_prompt=self._opens)
        alone = self._render([*self.messages[:i], marked]).text
        behind = commonprefix([alone.partition(closed)[2], whole.text.partition(closed)[2]])  # noqa: RUF071 (of characters)
        found = re.search(f"{opened}([^{opened}{closed}]*){closed}", whole.text)
        if not found or whole.text.replace(opened, "").replace(closed, "") != self.text:
            raise self._rewritten()
        first, last = found.start(), found.start() + len(found[1])
        if first < start:
            raise self._rewritten()
        return ReplySpan(start, last, last + len(behind))

    def _rewritten(self) -> ModelError:
        return ModelError(
            f"{self._template.origin}: replies of {excerpt(self.messages)} cannot be told from the rest: the chat"
            " template writes earlier turns differently once others follow; say data.train_on=last_turn, or choose"
            " another template"
        )

    def _find_content(self, turn: str, content: str) -> tuple[int, int]:
        """Where the message's text starts and ends within its turn; many templates trim it first."""
        for written in (content, content.strip()):
            at = turn.find(written)
            if at >= 0:
                return at, at + len(written)
        raise ModelError(
            f"{self._template.origin}: the chat template rewrites the reply {content[:60]!r}, so it cannot be told from"
            " the rest"
        )


def holds_any(value: Any, has: Any) -> bool:
    """Whether `has` is true of a text anywhere in messages or tools, keys included."""
    if isinstance(value, str):
        return bool(has(value))
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, SEQUENCES):
        for child in value:  # `any` would cost as much again as what it asks
            if holds_any(child, has):
                return True
    return False


def _mapped(value: Any, change: Any) -> Any:
    """Messages or tools with all of their texts changed but for keys and roles."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: child if key == "role" else _mapped(child, change) for key, child in value.items()}
    return [_mapped(child, change) for child in value] if isinstance(value, list | tuple) else value


def _unused(text: str, *values: Any) -> tuple[str, str]:
    """Two characters of the private use area that occur in none of the texts."""
    used = set(text)
    for value in values:
        holds_any(value, lambda found: used.update(found))
    free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
    return next(free), next(free)
