"""What tokenizers of every kind share: the files beside the vocabulary, the chat template, masks of replies.

**Control tokens are written by templates and never by text.** `</s>`, `<|im_end|>` or `<|eot_id|>` in a message, of a
user or of a data set, are spelt with ordinary tokens, so nobody ends a turn or opens another one by writing it. Control
tokens are those that the folder marks as special, those it names for a role (`eos_token`, ...), and those that look
like one (`SHAPE_OF_CONTROL`). Other added tokens, as `<think>` of Qwen3, are text and stay what they are in any place,
and so are tokens that a model learns (`add_tokens`), whatever they look like.
transformers gives the same ids with `apply_chat_template(..., sanitize_control_tokens=True)`, which however spells out
tokens that are not special too if the template writes them, and with `encode(..., split_special_tokens=True)`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tuner.errors import ModelError
from tuner.tokenizers.added_tokens import AddedTokens, Encoded, MarkedText, Run
from tuner.tokenizers.built_in_templates import BUILT_IN, template_source
from tuner.tokenizers.chat_template import DATE_OF_DATA, ChatTemplate
from tuner.tokenizers.files import CHAT_TEMPLATE, ROLES, TOKENIZER_FILES, read_json, sum_of, write_chat_template
from tuner.tokenizers.new_tokens import TEXT_TOKENS, require_new, write_new_tokens
from tuner.tokenizers.replies import Conversation, ReplySpan, holds_any
from tuner.types import Message, Tools

SHAPE_OF_CONTROL = re.compile(r"<\|.+\|>|<(start|end)_of_turn>")
"""How control tokens look that a folder does not mark as special: Gemma's, and those of an `added_tokens.json`, which
has no such mark."""


class FolderTokenizer(ABC):
    """See `tuner.types.Tokenizer`. The chat template is compiled at its first use.

    `pad_id` is `eos_id` where the folder names no padding token; padding is never trained on either way.

    Args:
        folder: holds the files.
        roles: special tokens by role which the vocabulary has of itself; what other files name goes before them.

    Raises:
        ModelError: if the files are damaged or name no end token.
    """

    vocab_size: int
    eos_id: int
    pad_id: int
    vocabulary_file: str

    def __init__(self, folder: Path, roles: Mapping[str, str]) -> None:
        self.folder = folder
        self.config = read_json(folder / "tokenizer_config.json")
        self._roles = roles
        self._text_tokens: list[str] = list(self.config.get(TEXT_TOKENS) or [])
        self._new_tokens: dict[str, int] = {}
        self.chosen_template: str | None = None
        self._origin_of_template = ""
        self.special_tokens = {**roles, **self._named_special_tokens()}

    def _find_ids(self) -> None:
        """To be called when `added` and `_id_of_token` are ready."""
        self.eos_id = self._find_eos_id()
        self.pad_id = self._id_of("pad_token") if "pad_token" in self.special_tokens else self.eos_id
        self._end_ids = self.added.control_ids | {self.eos_id}

    @property
    @abstractmethod
    def added(self) -> AddedTokens:
        """The tokens that are found in a text before anything else is."""

    def _named_special(self) -> list[str]:
        """Every special token that the folder names, with a role or without."""
        more = [*(self.config.get("additional_special_tokens") or []), *(self.config.get("extra_special_tokens") or [])]
        return [*self.special_tokens.values(), *(t["content"] if isinstance(t, dict) else str(t) for t in more)]

    def _is_control(self, token: str, *, special: bool) -> bool:
        """Whether an added token is a control token; see above."""
        if token in self._text_tokens:
            return False
        return special or token in self.special_tokens.values() or bool(SHAPE_OF_CONTROL.fullmatch(token))

    @abstractmethod
    def _id_of_token(self, token: str) -> int | None: ...

    @abstractmethod
    def _token_of_id(self, id_: int) -> str | None: ...

    @abstractmethod
    def _encode(self, texts: Sequence[MarkedText]) -> list[Encoded]:
        """Ids of each text, and behind which of its characters each token ends."""

    @abstractmethod
    def _encode_run(self, text: str, run: Run) -> Encoded:
        """What stands between two control tokens, which has none; the ends count from the text's beginning."""

    def _encode_runs(self, marked: MarkedText, *, only_control: bool = False) -> Encoded:
        """A text taken apart at its added tokens, or at its control tokens alone."""
        ids: list[int] = []
        ends: list[int] = []
        for run in self.added.split(marked, only_control=only_control):
            if run.id is None:
                encoded = self._encode_run(marked.text, run)
                ids += encoded.ids
                ends += encoded.ends
            else:
                ids.append(run.id)
                ends += self.added.ends(marked.text, [run.id], [(run.start, run.stop)])
        return Encoded(ids, ends)

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def encode(self, text: str, *, control_tokens: bool = False, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`.

        Args:
            text: any text; one that holds no control token has the same ids either way.
            control_tokens: read `</s>` and its like as the tokens they name, as in a text that a template wrote.
            add_special_tokens: put those before and behind it that the folder wants around a text (`add_bos_token` and
                `add_eos_token` of `tokenizer_config.json`, or what `tokenizer.json` says where that names neither).
        """
        plain = [] if control_tokens or not self.added.has_control(text) else [(0, len(text))]
        ids = self._encode([MarkedText(text, plain)])[0].ids
        if not add_special_tokens:
            return ids
        before, behind = self._around()
        return [*before, *ids, *behind]

    def _around(self) -> tuple[list[int], list[int]]:
        """The special tokens that are put before and behind a text."""
        named = [self.config.get(key) for key in ("add_bos_token", "add_eos_token")]
        if named == [None, None]:
            return self._around_by_default()
        before, behind = (
            [self._id_of(role)] if role in self.special_tokens and wanted else []
            for role, wanted in zip(("bos_token", "eos_token"), named, strict=True)
        )
        return before, behind

    @abstractmethod
    def _around_by_default(self) -> tuple[list[int], list[int]]:
        """The same, where `tokenizer_config.json` does not say it."""

    def render_chat(
        self, messages: Sequence[Message], *, tools: Tools | None = None, add_generation_prompt: bool = False
    ) -> str:
        return self.chat_template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt).text

    def apply_chat_template(
        self, messages: Sequence[Message], *, tools: Tools | None = None, add_generation_prompt: bool = False
    ) -> list[int]:
        conversation = Conversation(self.chat_template, messages, tools, add_generation_prompt=add_generation_prompt)
        return self._encode([self._marked(conversation, tools)])[0].ids

    def encode_chat(
        self, messages: Sequence[Message], *, tools: Tools | None = None, last_reply_only: bool = False
    ) -> tuple[list[int], list[bool]]:
        return self.encode_chats([messages], tools=[tools], last_reply_only=last_reply_only)[0]

    def encode_chats(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        tools: Sequence[Tools | None] | None = None,
        last_reply_only: bool = False,
    ) -> list[tuple[list[int], list[bool]]]:
        """`encode_chat` of many conversations, tokenized on all cores where the kind can.

        A token counts as the assistant's if it ends within the reply or is the end token behind it: the first control
        token that follows the reply's text within its turn, the last of a turn that calls tools. A template that writes
        none gets none, and one that marks replies with `generation` blocks says it itself.

        Raises:
            ModelError: if there is no chat template, or it fails on a conversation.
        """
        offered = tools or [None] * len(conversations)
        written = [
            Conversation(self.chat_template, messages, given, now=DATE_OF_DATA)
            for messages, given in zip(conversations, offered, strict=True)
        ]
        replies = [conversation.replies(last_only=last_reply_only) for conversation in written]
        marked = [self._marked(conversation, given) for conversation, given in zip(written, offered, strict=True)]
        return [
            (encoded.ids, self._reply_mask(encoded, spans))
            for encoded, spans in zip(self._encode(marked), replies, strict=True)
        ]

    def _marked(self, conversation: Conversation, tools: Tools | None) -> MarkedText:
        """The rendered conversation, with what its messages wrote of control tokens marked as plain text."""
        if not holds_any([conversation.messages, tools or []], self.added.has_control):
            return MarkedText(conversation.text, [])
        return MarkedText(conversation.text, conversation.written_by_messages(self.added.control))

    def _reply_mask(self, encoded: Encoded, replies: Iterable[ReplySpan]) -> list[bool]:
        ids, ends = encoded.ids, encoded.ends
        mask = [False] * len(ids)
        for reply in replies:
            first, last = bisect_right(ends, reply.start), bisect_right(ends, reply.stop)
            if reply.exact:
                reaching = min(bisect_left(ends, reply.stop), len(ids) - 1)
                # Behind a control token may be one of no letters, the space that begins a text
                last = reaching + 1 if ids[reaching] in self._end_ids else max(last, reaching + 1)
                mask[first:last] = [True] * (last - first)
                continue
            behind = bisect_right(ends, reply.content_end, first, last)
            ends_turn = (k for k in range(behind, last) if ids[k] in self._end_ids)
            end_token = next(ends_turn, None) if not reply.whole else max(ends_turn, default=None)
            until = (last if reply.whole else behind) if end_token is None else end_token + 1
            mask[first:until] = [True] * (until - first)
        return mask

    def add_tokens(self, tokens: Sequence[str], control: Collection[str] = ()) -> list[int]:
        require_new({token: self._id_of_token(token) for token in tokens}, self.folder)
        self._text_tokens += [token for token in tokens if token not in control]
        ids = self._learn(tokens)
        self._end_ids = self.added.control_ids | {self.eos_id}
        self._new_tokens |= dict(zip(tokens, ids, strict=True))
        return ids

    @abstractmethod
    def _learn(self, tokens: Sequence[str]) -> list[int]:
        """Add tokens that are new; their ids."""

    def digest(self) -> str:
        """Of the files, what was added since they were read, this code, and the libraries that run it.

        The date that a template writes is `DATE_OF_DATA` while data is prepared, so it is that of this code.
        """
        files = [self.folder / name for name in TOKENIZER_FILES]
        facts: dict[str, Any] = {file.name: sum_of(file) for file in files if file.is_file()}
        facts |= {file.name: sum_of(file) for file in Path(__file__).parent.glob("*.py")}
        facts |= {name: version(name) for name in ("tokenizers", "sentencepiece", "jinja2")}
        facts |= {"end": sorted(self.end_ids), "new": self._new_tokens, "text": self._text_tokens}
        facts["template"] = self._template_source()
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _template_source(self) -> str:
        try:
            return self.chat_template.source
        except ModelError:  # texts need none
            return ""

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; what is made at its first use is made there again."""
        kinds = [vars(kind) for kind in type(self).__mro__]
        made = {name for kind in kinds for name, of in kind.items() if isinstance(of, cached_property)}
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            source, target = self.folder / name, folder / name
            if source.exists() and not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
        if settings := self._settings():
            target = folder / "tokenizer_config.json"
            if not target.exists():
                target.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if self._new_tokens:
            write_new_tokens(folder, self._new_tokens, self._text_tokens, self._token_of_id(self.eos_id))
        if self.chosen_template is not None:
            write_chat_template(folder, self.chosen_template)

    def _settings(self) -> dict[str, Any]:
        """What `tokenizer_config.json` has to say for transformers to read the vocabulary alike; nothing if it does."""
        return {}

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The folder's chat template.

        Raises:
            ModelError: if there is none, as with most base models.
        """
        if self.chosen_template is not None:
            return ChatTemplate(self.chosen_template, self.special_tokens, self._origin_of_template)
        file = self.folder / CHAT_TEMPLATE
        source = file.read_text(encoding="utf-8") if file.exists() else self.config.get("chat_template")
        if isinstance(source, list):  # several named ones; `default` is the one for plain conversations
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not source:
            fitting = [name for name in BUILT_IN if not self._lacks(name)]
            raise ModelError(
                f"{self.folder} has no chat template (neither chat_template.jinja nor chat_template in"
                " tokenizer_config.json), as is usual for a base model: take its instruct version, or say"
                f" model.chat_template=NAME; of the built-in ones this vocabulary has the tokens of"
                f" {', '.join(fitting) or 'none'}; or model.chat_template=FILE.jinja"
            )
        return ChatTemplate(source, self.special_tokens, str(self.folder))

    def use_chat_template(self, chosen: str) -> None:
        source = template_source(chosen)
        if chosen in BUILT_IN and (lacking := self._lacks(chosen)):
            raise ModelError(
                f"model.chat_template={chosen} writes {', '.join(lacking)}, which {self.folder} has not as one token"
                " each; valid here: "
                f"{', '.join(name for name in BUILT_IN if not self._lacks(name)) or 'none'}, or a .jinja file"
                f"{_how_to_learn(chosen, lacking)}"
            )
        self.chosen_template, self._origin_of_template = source, f"model.chat_template={chosen}"
        self.__dict__.pop("chat_template", None)
        self.__dict__.pop("reply_end_ids", None)

    def _lacks(self, built_in: str) -> list[str]:
        """What a built-in template writes and the vocabulary does not have as one token."""
        template = BUILT_IN[built_in]
        lacking = [token for token in template.control if self._id_of_token(token) not in self.added.control_ids]
        return [*lacking, *(role for role in template.roles if role not in self.special_tokens)]

    def _named_special_tokens(self) -> dict[str, str]:
        """Special tokens by role; `tokenizer_config.json` wins over the older `special_tokens_map.json`."""
        named = {**read_json(self.folder / "special_tokens_map.json"), **self.config}
        tokens = {role: named[role] for role in ROLES if named.get(role)}
        return {role: token["content"] if isinstance(token, dict) else token for role, token in tokens.items()}

    @cached_property
    def end_ids(self) -> frozenset[int]:
        return frozenset({self.eos_id, *self._ids_of_generation()})

    @cached_property
    def reply_end_ids(self) -> frozenset[int]:
        ids, mask = self.encode_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        last = max(i for i, is_reply in enumerate(mask) if is_reply)
        return self.end_ids | ({ids[last]} & self._end_ids)

    def _ids_of_generation(self) -> list[int]:
        """The end tokens that transformers' `generate` stops at."""
        for name in ("generation_config.json", "config.json"):
            given = read_json(self.folder / name).get("eos_token_id")
            if given is not None:
                return [int(id_) for id_ in (given if isinstance(given, list) else [given])]
        return []

    def _find_eos_id(self) -> int:
        if "eos_token" in self._named_special_tokens():
            return self._id_of("eos_token")
        if ids := self._ids_of_generation():
            return ids[0]
        if "eos_token" in self._roles:
            return self._id_of("eos_token")
        raise ModelError(
            f"{self.folder} names no end token: looked for eos_token in tokenizer_config.json and"
            " special_tokens_map.json, and for eos_token_id in generation_config.json and config.json"
        )

    def _id_of(self, role: str) -> int:
        token = self.special_tokens[role]
        id_ = self._id_of_token(token)
        if id_ is None:
            raise ModelError(f"{self.folder}: the {role} {token!r} is not in {self.vocabulary_file}")
        return id_


def _how_to_learn(built_in: str, lacking: Sequence[str]) -> str:
    """The word that teaches a model the control tokens of a template; none where a role is what is missing."""
    if not set(lacking) <= set(BUILT_IN[built_in].control):
        return ""
    return f'; or learn them: "model.add_tokens=[{",".join(map(repr, lacking))}]"'
