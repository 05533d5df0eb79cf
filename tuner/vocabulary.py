"""A model's tokens: its tokenizer, those that it learns, and whether the model has rows for all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.adapter_config import read_adapter_config
from tuner.errors import ModelError
from tuner.models.config import ModelConfig
from tuner.models.family import located, stated
from tuner.models.hub import cached_folder
from tuner.models.package import cached
from tuner.peft.adapter_folder import rows_wanted
from tuner.tokenizers import has_tokenizer, load_tokenizer
from tuner.tokenizers.built_in_templates import control_tokens_of
from tuner.tokenizers.files import CHAT_TEMPLATE
from tuner.tokenizers.packaged import KINDS, VERSION, write_packaged_tokenizer
from tuner.types import Tokenizer


def tokenizer_of(config: ModelConfig) -> Tokenizer:
    """The tokenizer of a located model, before tokens are added; random weights have a small packaged one.

    Raises:
        ModelError: random weights, and no tokenizer named.
    """
    if config.path is not None:
        return load_tokenizer(config.path)
    if (kind := config.random_tokenizer) is None:
        raise ModelError(f"model.random_tokenizer=null: random weights need one; valid: {', '.join(KINDS)}")
    name = f"{kind}-tokenizer-v{VERSION}"
    return load_tokenizer(cached(name, lambda folder: write_packaged_tokenizer(kind, folder)))


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens.

    Attributes:
        tokenizer: knows all of them.
        new_tokens: ids of those that get new rows of embedding and head.
    """

    tokenizer: Tokenizer
    new_tokens: Sequence[int] = ()


def vocabulary_of(config: ModelConfig, adapter: Path | None = None) -> Vocabulary:
    """The tokens of a located model: those of its tokenizer and `add_tokens`, or what an adapter brings.

    Args:
        config: as `located` returns it.
        adapter: a folder; where rows of tokens trained with it, the tokenizer beside it is the one that knows them. A
            chat template beside it is the one it was trained with, unless `config` chooses another.

    Raises:
        ModelError: no tokenizer, or one that has some of `add_tokens` already.
    """
    if adapter is None:
        tokenizer = tokenizer_of(config)
        new_tokens = _learnt(tokenizer, config) if config.add_tokens else ()
        return Vocabulary(_writing_with(tokenizer, config.chat_template), new_tokens)
    brings_tokenizer = read_adapter_config(adapter).token_rows and has_tokenizer(adapter)
    tokenizer = load_tokenizer(adapter) if brings_tokenizer else tokenizer_of(config)
    brought = adapter / CHAT_TEMPLATE
    chosen = config.chat_template or (str(brought) if brought.is_file() else None)
    return Vocabulary(_writing_with(tokenizer, chosen), rows_brought(adapter, config))


def _learnt(tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
    """Ids of `add_tokens`; those that the chosen chat template writes are control tokens."""
    return tokenizer.add_tokens(config.add_tokens, control_tokens_of(config.chat_template))


def _writing_with(tokenizer: Tokenizer, chosen: str | None) -> Tokenizer:
    """A tokenizer whose conversations are written with the chosen template, its folder's if none is."""
    if chosen is not None:
        tokenizer.use_chat_template(chosen)
    return tokenizer


def tokens_at_hand(config: ModelConfig, adapter: Path | None = None) -> tuple[ModelConfig, Vocabulary]:
    """Shape and tokens of a model that is not going to be loaded: no weights are looked for, and no hub is asked.

    Raises:
        ModelError: as `located` and `vocabulary_of`; the snapshot of a `source` is not in the cache.
    """
    if config.source is not None:
        folder = cached_folder(config.source, config.revision)
        known = replace(stated(config), path=str(folder))
    else:
        known = located(config)
    return known, vocabulary_of(known, adapter)


def learning_said(vocabulary: Vocabulary, config: ModelConfig) -> list[str]:
    """A line of what `add_tokens` came to, none without them."""
    if not config.add_tokens:
        return []
    named = ", ".join(f"{token} = {id_}" for token, id_ in zip(config.add_tokens, vocabulary.new_tokens, strict=True))
    spare = sum(id_ < config.vocab_size for id_ in vocabulary.new_tokens)
    return [f"new tokens: {named}; {spare} in rows that were spare, {len(vocabulary.new_tokens) - spare} in added rows"]


def rows_brought(adapter: Path, config: ModelConfig) -> Sequence[int]:
    """Ids beyond the rows of a model, up to the last that an adapter has a row of."""
    return range(config.vocab_size, rows_wanted(adapter))


def require_embedded(ids: Iterable[int], config: ModelConfig, new_tokens: Sequence[int] = ()) -> None:
    """Refuse tokens that the model has no embedding of, as those of another model's tokenizer.

    Raises:
        ModelError: naming the largest.
    """
    if (largest := max(ids)) >= max(config.vocab_size, *(token + 1 for token in new_tokens), 0):
        raise ModelError(
            f"model.path={config.path}: its tokenizer makes token {largest} and its embedding has {config.vocab_size} "
            "rows (vocab_size); is the tokenizer that of another model?"
        )


def expected_tokens(config: ModelConfig) -> Sequence[int]:
    """Ids that `add_tokens` will have; without a tokenizer at hand, which is said, as if it had V tokens.

    Raises:
        ModelError: the tokenizer that is there has some of them already.
    """
    if not config.add_tokens:
        return ()
    folder = cached_folder(config.source, config.revision) if config.source else config.path and Path(config.path)
    if config.random_weights or (folder and has_tokenizer(Path(folder))):
        return vocabulary_of(replace(config, path=str(folder) if folder else None)).new_tokens
    print(
        f"model.add_tokens: no tokenizer is at hand, so each is counted as a row beyond the {config.vocab_size} that "
        "there are; where a tokenizer has fewer tokens, spare rows are used first",
        file=sys.stderr,
    )
    return range(config.vocab_size, config.vocab_size + len(config.add_tokens))
