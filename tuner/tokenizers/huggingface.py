"""Tokenizers of Hugging Face folders: `tokenizer.json`, run by the `tokenizers` library, with its chat template.

transformers builds the same from the same files, but costs seconds to import and is no dependency of a run.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from tuner.errors import ModelError
from tuner.tokenizers.chat_template import ChatTemplate, ReplySpan
from tuner.types import Message

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Every file that may belong to a tokenizer; only the first has to exist."""

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class HuggingFaceTokenizer:
    """See `tuner.types.Tokenizer`. The chat template is compiled at its first use.

    `pad_id` is `eos_id` where the folder names no padding token; padding is never trained on either way.

    Raises:
        ModelError: if the folder has no `tokenizer.json`, or its files are damaged or name no end token.
    """

    vocab_size: int
    eos_id: int
    pad_id: int

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokenizer = _read_tokenizer_json(folder)
        self._config = _read_json(folder / "tokenizer_config.json")
        self.special_tokens = self._find_special_tokens()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_id = self._find_eos_id()
        self.pad_id = self._id_of("pad_token") if "pad_token" in self.special_tokens else self.eos_id
        added = self._tokenizer.get_added_tokens_decoder()
        self._end_ids = {id_ for id_, token in added.items() if token.special} | {self.eos_id}

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    def apply_chat_template(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> list[int]:
        return self.encode(self.render_chat(messages, add_generation_prompt=add_generation_prompt))

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        return self.encode_chats([messages])[0]

    def encode_chats(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]]]:
        """`encode_chat` of many conversations, tokenized on all cores.

        A token counts as the assistant's if it ends within the reply or is the end token behind it: the first special
        token that follows the reply's text within its turn. A template that writes none gets none.

        Raises:
            ModelError: if there is no chat template, or it fails on a conversation.
        """
        rendered = [self.chat_template.render_with_replies(messages) for messages in conversations]
        encodings = self._tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        return [
            (encoding.ids, self._reply_mask(encoding, replies))
            for encoding, (_, replies) in zip(encodings, rendered, strict=True)
        ]

    def _reply_mask(self, encoding: Encoding, replies: Sequence[ReplySpan]) -> list[bool]:
        ids, offsets = encoding.ids, encoding.offsets
        # By their ends: byte-level tokenizers may leave the space that a token begins with out of its offsets
        ends = [end for _, end in offsets]
        mask = [False] * len(ids)
        for reply in replies:
            first, last = bisect_right(ends, reply.start), bisect_right(ends, reply.stop)
            behind = bisect_right(ends, reply.content_end, first, last)
            end_token = next((k for k in range(behind, last) if ids[k] in self._end_ids), None)
            until = behind if end_token is None else end_token + 1
            mask[first:until] = [True] * (until - first)
        return mask

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            source, target = self.folder / name, folder / name
            if source.exists() and not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The folder's chat template.

        Raises:
            ModelError: if there is none, as with most base models.
        """
        file = self.folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.exists() else self._config.get("chat_template")
        if isinstance(source, list):  # several named ones; `default` is the one for plain conversations
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not source:
            raise ModelError(
                f"{self.folder} has no chat template (neither chat_template.jinja nor chat_template in"
                " tokenizer_config.json), as is usual for a base model: take its instruct version or put a"
                " chat_template.jinja into the folder"
            )
        return ChatTemplate(source, self.special_tokens, str(self.folder))

    def _find_special_tokens(self) -> dict[str, str]:
        """Special tokens by role; `tokenizer_config.json` wins over the older `special_tokens_map.json`."""
        named = {**_read_json(self.folder / "special_tokens_map.json"), **self._config}
        tokens = {role: named[role] for role in _SPECIAL_TOKENS if named.get(role)}
        return {role: token["content"] if isinstance(token, dict) else token for role, token in tokens.items()}

    def _find_eos_id(self) -> int:
        if "eos_token" in self.special_tokens:
            return self._id_of("eos_token")
        for name in ("generation_config.json", "config.json"):
            eos_id = _read_json(self.folder / name).get("eos_token_id")
            if eos_id is not None:
                return int(eos_id[0] if isinstance(eos_id, list) else eos_id)
        raise ModelError(
            f"{self.folder} names no end token: looked for eos_token in tokenizer_config.json and"
            " special_tokens_map.json, and for eos_token_id in generation_config.json and config.json"
        )

    def _id_of(self, role: str) -> int:
        token = self.special_tokens[role]
        id_ = self._tokenizer.token_to_id(token)
        if id_ is None:
            raise ModelError(f"{self.folder}: the {role} {token!r} is not in tokenizer.json")
        return id_


def _read_tokenizer_json(folder: Path) -> FastTokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        what = f"{folder} has no tokenizer.json" if folder.is_dir() else f"{folder} is not a folder"
        raise ModelError(f"{what}: a tokenizer is looked for in tokenizer.json (and tokenizer_config.json beside it)")
    try:
        tokenizer = FastTokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise ModelError(f"{file} cannot be read as a tokenizer: {' '.join(str(error).split())}") from error
    # Some files carry the settings of the last call that their author made
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, empty if there is no such file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a {type(content).__name__}, not an object")
    return content
