"""Tokenizers of Hugging Face folders: `tokenizer.json`, run by the `tokenizers` library.

transformers builds the same from the same files, but costs seconds to import and is no dependency of a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken as FastAddedToken
from tokenizers import Tokenizer as FastTokenizer

from tuner.errors import ModelError
from tuner.tokenizers.added_tokens import AddedToken, AddedTokens, Behind, Encoded, MarkedText, Run
from tuner.tokenizers.folder import FolderTokenizer
from tuner.tokenizers.steps import parts_of, words_are_apart
from tuner.tokenizers.words import Words


class FastFolderTokenizer(FolderTokenizer):
    """A folder's tokenizer that the `tokenizers` library runs.

    Args:
        folder: holds the files.
        tokenizer: its vocabulary and rules.
        roles: special tokens by role, where the folder's other files name none.
    """

    def __init__(self, folder: Path, tokenizer: FastTokenizer, roles: dict[str, str]) -> None:
        super().__init__(folder, roles)
        self._tokenizer = tokenizer
        self._find_roles_in_text()
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self._find_ids()

    def _find_roles_in_text(self) -> None:
        """Let special tokens that the vocabulary has be found in a text, where `tokenizer.json` does not list them."""
        listed = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        names = [name for name in dict.fromkeys(self._named_special()) if name not in listed]
        found = [name for name in names if self._tokenizer.token_to_id(name) is not None]
        self._tokenizer.add_special_tokens([FastAddedToken(name, special=True, normalized=False) for name in found])

    @cached_property
    def added(self) -> AddedTokens:
        return AddedTokens(
            AddedToken(
                token.content,
                id_,
                special=token.special,
                control=self._is_control(token.content, special=token.special),
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
            )
            for id_, token in self._tokenizer.get_added_tokens_decoder().items()
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _around_by_default(self) -> tuple[list[int], list[int]]:
        bare, around = (self._tokenizer.encode("x", add_special_tokens=add).ids for add in (False, True))
        at = next(k for k in range(len(around)) if around[k : k + len(bare)] == bare)
        return around[:at], around[at + len(bare) :]

    def _id_of_token(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _token_of_id(self, id_: int) -> str | None:
        return self._tokenizer.id_to_token(id_)

    def _learn(self, tokens: Sequence[str]) -> list[int]:
        # `normalized=False`: matched as it is written, before a normalizer puts marks in place of spaces.
        self._tokenizer.add_tokens([FastAddedToken(token, special=False, normalized=False) for token in tokens])
        for made in ("added", "_words", "_without_control"):
            self.__dict__.pop(made, None)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return [cast(int, self._tokenizer.token_to_id(token)) for token in tokens]

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self._new_tokens:
            self._tokenizer.save(str(folder / "tokenizer.json"))

    def _encode(self, texts: Sequence[MarkedText]) -> list[Encoded]:
        unmarked = [marked.text for marked in texts if not marked.plain]
        by_itself = iter(self._words.encode(unmarked) if self._words else self._encode_whole(unmarked))
        return [self._encode_runs(marked, only_control=True) if marked.plain else next(by_itself) for marked in texts]

    @cached_property
    def _words(self) -> Words | None:
        """The words of texts, where they have tokens of their own."""
        return Words(self._tokenizer) if words_are_apart(self._tokenizer) else None

    def _encode_whole(self, texts: Sequence[str]) -> list[Encoded]:
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        # By their ends: byte-level tokenizers may leave the space that a token begins with out of its offsets
        return [
            Encoded(encoding.ids, self.added.ends(text, encoding.ids, encoding.offsets))
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _encode_run(self, text: str, run: Run) -> Encoded:
        encoding = self._without_control[run.behind].encode(text[run.start : run.stop], add_special_tokens=False)
        if run.stop - run.start > 1 and not self.added.control_ids.isdisjoint(encoding.ids):
            # The vocabulary itself merges letters into a control token: let no two of them meet
            encoded = [self._encode_run(text, letter) for letter in run.letters()]
            return Encoded([i for one in encoded for i in one.ids], [end for one in encoded for end in one.ends])
        return Encoded(encoding.ids, [run.start + end for _, end in encoding.offsets])

    @cached_property
    def _without_control(self) -> dict[Behind, FastTokenizer]:
        """The same tokenizer that knows no control tokens, by what is before the text it is to encode.

        The space that begins a text is put by some before its first letters alone, by some behind added tokens too, and
        by none within a text.
        """
        content = json.loads(self._tokenizer.to_str())
        for token in content["added_tokens"]:
            token["special"] = token["content"] in self.added.control
        found: dict[Behind, FastTokenizer] = {}
        behinds: tuple[Behind, ...] = ("nothing", "token", "text")
        for behind in behinds:
            found[behind] = FastTokenizer.from_str(json.dumps(_without_space(content, behind)))
            found[behind].encode_special_tokens = True
        return found


class HuggingFaceTokenizer(FastFolderTokenizer):
    """The tokenizer in a folder's `tokenizer.json`; see `tuner.types.Tokenizer`.

    Raises:
        ModelError: if the folder has no `tokenizer.json`, or its files are damaged or name no end token.
    """

    vocabulary_file = "tokenizer.json"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, _read_tokenizer_json(folder), {})


def _without_space(content: Mapping[str, Any], behind: Behind) -> dict[str, Any]:
    """A `tokenizer.json` without the rules that put a space before a text, as far as they do not apply there."""
    if behind == "nothing":
        return dict(content)
    parts = {key: parts_of(content[key], inner) for key, inner in STEPS.items()}
    for part in parts["pre_tokenizer"]:
        if part["type"] == "Metaspace" and (behind == "text" or part.get("prepend_scheme") == "first"):
            part["prepend_scheme"] = "never"
        if part["type"] == "ByteLevel" and behind == "text":
            part["add_prefix_space"] = False
    if behind == "text":
        parts["normalizer"] = [part for part in parts["normalizer"] if part["type"] != "Prepend"]
    steps = {key: {"type": "Sequence", STEPS[key]: parts[key]} if parts[key] else None for key in STEPS}
    return {**content, **steps}


STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
"""Of what happens to a text before its words become tokens, and where a sequence of such steps has them."""


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
