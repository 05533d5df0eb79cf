"""Tokenizers in a sentencepiece `tokenizer.model`, run by the `sentencepiece` library: Llama 2, Mistral, Gemma, Phi-3.

The model says how letters become pieces; `tokenizer_config.json` and `added_tokens.json` say which tokens stand beside
it. Ids are those of transformers' `LlamaTokenizer` and `GemmaTokenizer` of the same folder.

**The space before a text.** Llama's model puts one there (`add_dummy_prefix`), Gemma's does not. It is put before the
first letters of a text, unless they are a space already; with `legacy: true` in `tokenizer_config.json` before the
first letters behind each added token too. `add_prefix_space` there goes before what the model says. A folder of Mistral
or Phi-3 without `tokenizer.json` gets no such space from transformers' `AutoTokenizer`, which reads it as no class in
particular; here it gets what its model says, which is what `LlamaTokenizer`, the class that these folders name, does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import decoders

from tuner.errors import ModelError
from tuner.tokenizers.added_tokens import AddedToken, AddedTokens, Encoded, MarkedText, Run
from tuner.tokenizers.files import tokens_beside
from tuner.tokenizers.folder import FolderTokenizer

SPACE = "\u2581"
"""What a space is in a piece."""

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
"""`ModelProto.SentencePiece.Type`."""


class SentencePieceTokenizer(FolderTokenizer):
    """The tokenizer in a folder's `tokenizer.model`; see `tuner.types.Tokenizer`.

    Raises:
        ModelError: if that is empty, damaged or no sentencepiece model, or the files beside it are damaged.
    """

    vocabulary_file = "tokenizer.model"

    def __init__(self, folder: Path) -> None:
        self._model = _read_model(folder / "tokenizer.model")
        super().__init__(folder, _roles(self._model))
        self._learnt: list[AddedToken] = []
        self._pieces = [piece.piece for piece in self._model.pieces]
        self._tokens = dict(enumerate(self._pieces)) | {token.id: token.content for token in self.added.tokens.values()}
        self._ids = {content: id_ for id_, content in self._tokens.items()}
        self.vocab_size = len(self._tokens)
        self._find_ids()
        if lost := [name for name in self._named_special() if name not in self._ids]:
            raise ModelError(f"{folder}: tokenizer_config.json names {', '.join(map(repr, lost))}, and no file its id")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": self._model.SerializeToString()}  # its class cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {**state, "_model": _parsed(state["_model"])}

    @cached_property
    def added(self) -> AddedTokens:
        return AddedTokens([*self._added(), *self._learnt])

    def _added(self) -> Iterator[AddedToken]:
        """First those of the model itself, so that what the other files say of the same ones wins."""
        extra = self._named_special()
        for id_, piece in enumerate(self._model.pieces):
            if piece.type == CONTROL or piece.piece in extra:
                yield AddedToken(piece.piece, id_)
            elif piece.type == USER_DEFINED and SPACE not in piece.piece:
                control = self._is_control(piece.piece, special=False)
                yield AddedToken(piece.piece, id_, special=False, control=control)
        model_says = {piece.piece for piece in self._model.pieces if piece.type == CONTROL}
        for token in tokens_beside(self.folder, extra):
            name, special = token["content"], bool(token.get("special") or token["content"] in extra)
            control = self._is_control(name, special=special or name in model_says)
            sides = {key: bool(token.get(key)) for key in ("lstrip", "rstrip", "single_word")}
            yield AddedToken(name, token["id"], special=special, control=control, **sides)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        skipped = self.added.special_ids if skip_special_tokens else ()
        return self._decoder.decode([self._tokens[id_] for id_ in ids if id_ in self._tokens and id_ not in skipped])

    def _around_by_default(self) -> tuple[list[int], list[int]]:
        """The token that begins a text, as these models were trained, where there is no `tokenizer_config.json`.

        If there is one that does not say it, transformers' `CodeLlamaTokenizer` alone puts it.
        """
        begins = not self.config or str(self.config.get("tokenizer_class")).startswith("CodeLlama")
        return [self._id_of("bos_token")] if begins and "bos_token" in self.special_tokens else [], []

    def _id_of_token(self, token: str) -> int | None:
        return self._ids.get(token)

    def _token_of_id(self, id_: int) -> str | None:
        return self._tokens.get(id_)

    def _learn(self, tokens: Sequence[str]) -> list[int]:
        new = dict(enumerate(tokens, max(self._tokens) + 1))
        self._learnt += [
            AddedToken(token, id_, special=False, control=self._is_control(token, special=False))
            for id_, token in new.items()
        ]
        self._tokens |= new
        self._ids |= {token: id_ for id_, token in new.items()}
        self.__dict__.pop("added", None)
        self.vocab_size = len(self._tokens)
        return list(new)

    def _encode(self, texts: Sequence[MarkedText]) -> list[Encoded]:
        return [self._encode_runs(marked) for marked in texts]

    def _encode_run(self, text: str, run: Run) -> Encoded:
        letters = text[run.start : run.stop]
        begins = run.behind in {"never": (), "first": ("nothing",), "always": ("nothing", "token")}[self._prefix]
        if letters.startswith((" ", SPACE)):  # which is its own, unless the model takes it away first
            begins = self._model.normalizer_spec.remove_extra_whitespaces
        found = (self._with_space if begins else self._without_space).encode(letters, out_type="proto").pieces
        ends, end = [], run.start
        for piece in found:
            end += len(piece.surface)
            ends.append(end)
        # The letter that several byte pieces spell is the last one's; it ends there for all of them
        for k in range(len(found) - 2, -1, -1):
            if not found[k].surface and self._model.pieces[found[k].id].type == BYTE:
                ends[k] = ends[k + 1]
        return Encoded([piece.id for piece in found], ends)

    @cached_property
    def _prefix(self) -> str:
        """Where a space is put: `never`, before the `first` letters, or `always` behind added tokens too."""
        space = self.config.get("add_prefix_space")
        if space is None:
            gemma = str(self.config.get("tokenizer_class", "")).startswith("Gemma")
            space = self._model.normalizer_spec.add_dummy_prefix and not gemma
        if not space:
            return "never"
        return "always" if self.config.get("legacy") else "first"

    def _settings(self) -> dict[str, Any]:
        named = "GemmaTokenizer" if self._prefix == "never" else "LlamaTokenizer"
        return {**self.special_tokens, "tokenizer_class": named, "legacy": False, "add_bos_token": True}

    @cached_property
    def _with_space(self) -> SentencePieceProcessor:
        return self._processor(add_dummy_prefix=True)

    @cached_property
    def _without_space(self) -> SentencePieceProcessor:
        return self._processor(add_dummy_prefix=False)

    def _processor(self, *, add_dummy_prefix: bool) -> SentencePieceProcessor:
        """The model, with pieces that only a template may write left out: they are found before."""
        model = type(self._model)()
        model.CopyFrom(self._model)
        model.normalizer_spec.add_dummy_prefix = add_dummy_prefix
        for piece in model.pieces:
            if piece.type not in (UNKNOWN, CONTROL, BYTE) and piece.piece in self.added.tokens:
                piece.type = USER_DEFINED if not self.added.tokens[piece.piece].control else UNUSED
        return SentencePieceProcessor(model_proto=model.SerializeToString())

    @cached_property
    def _decoder(self) -> decoders.Decoder:
        parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        return decoders.Sequence(parts if self._prefix == "never" else [*parts, decoders.Strip(" ", 1, 0)])


def _read_model(file: Path) -> Any:
    """The model as sentencepiece's own protobuf.

    Raises:
        ModelError: if it is empty, damaged, or something else.
    """
    content = file.read_bytes()
    if not content:
        raise ModelError(f"{file} is empty")
    try:
        SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ModelError(f"{file} is neither a sentencepiece model nor a list of tokens for tiktoken") from error
    model = _parsed(content)
    if not model.pieces:
        raise ModelError(f"{file} holds no pieces")
    return model


def _parsed(content: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined] # made when it is imported
    model.ParseFromString(content)
    return model


def _roles(model: Any) -> dict[str, str]:
    """Special tokens by role, as the model numbers them."""
    trainer = model.trainer_spec
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "pad_token": trainer.pad_id}
    unknown = next((piece.piece for piece in model.pieces if piece.type == UNKNOWN), "")
    named = {role: model.pieces[id_].piece for role, id_ in ids.items() if 0 <= id_ < len(model.pieces)}
    return named | ({"unk_token": unknown} if unknown else {})
