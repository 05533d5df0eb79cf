"""Rows of tokens that an adapter folder brings: whether they fit a model, and into it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from tuner.adapter_config import AdapterConfig
from tuner.peft.saved_modules import EMBEDDING, HEAD
from tuner.peft.stored import ROWS, Contents
from tuner.peft.token_rows import Tokens, put_rows, row_layers
from tuner.types import CausalLM


def tokens_of(model: nn.Module, contents: Contents, config: AdapterConfig) -> Tokens:
    """Whose rows an adapter brings; those of a tied matrix PEFT names once and may save under both of its names."""
    tokens = dict(config.token_rows)
    if cast(CausalLM, model).tied and HEAD in contents.rows and EMBEDDING in tokens:
        tokens.setdefault(HEAD, tokens[EMBEDDING])
    return tokens


def row_problems(model: nn.Module, contents: Contents, tokens: Tokens) -> Iterator[str]:
    """What is wrong with the rows of an adapter."""
    lm = cast(Any, model)
    for path in sorted(tokens.keys() ^ contents.rows.keys()):
        without = "which trainable_token_indices names" if path in tokens else "and no tokens are named"
        yield f"{path}.{ROWS} is {'missing' if path in tokens else 'there'}, {without}"
    for path in sorted(tokens.keys() & contents.rows.keys()):
        ids, shape = tokens[path], tuple(contents.rows[path].shape)
        if shape != (wanted := (len(ids), lm.config.hidden_size)):
            yield f"{path}.{ROWS} is {list(shape)} and should be {list(wanted)}"
        if max(ids) >= lm.vocab_size:
            yield f"{path} has no row for token {max(ids)}: the model has {lm.vocab_size}"
    yield from _matrix_problems(model, contents, tokens)
    if lm.tied and HEAD in tokens and tokens[HEAD] != tokens.get(EMBEDDING):
        yield f"trainable_token_indices names other tokens for {HEAD} than for {EMBEDDING}, which are one matrix here"
    ends = [contents.rows.get(path) for path in (EMBEDDING, HEAD)]
    if lm.tied and ends[0] is not None and ends[1] is not None and not torch.equal(ends[0], ends[1]):
        yield f"{HEAD} and {EMBEDDING} have different rows, and are one matrix here"
    if HEAD in contents.pairs and (HEAD in tokens or (lm.tied and tokens)):
        yield f"{HEAD} has an adapter and rows of its own"


def _matrix_problems(model: nn.Module, contents: Contents, tokens: Tokens) -> Iterator[str]:
    """What is wrong with matrices that are saved whole: rows that did not train have to be those of the base."""
    lm = cast(CausalLM, model)
    for path, matrix in contents.matrices.items():
        ours = model.get_parameter(f"{path}.weight") if path in (EMBEDDING, HEAD) else None
        if ours is None or matrix.shape[1:] != ours.shape[1:] or len(matrix) > len(ours):
            shape = None if ours is None else list(ours.shape)
            yield f"the whole {path} is {list(matrix.shape)}, and the matrix of the model is {shape}"
            continue
        frozen = torch.ones(len(matrix), dtype=torch.bool)
        frozen[[token for token in (*tokens.get(path, ()), *lm.new_tokens) if token < len(matrix)]] = False
        if not ours.is_meta and not torch.equal(matrix[frozen].to(ours), ours[: len(matrix)][frozen.to(ours.device)]):
            yield f"the whole {path} has other rows than the base, beside those that trained"


def load_rows(model: nn.Module, contents: Contents, tokens: Tokens) -> None:
    """Put rows that were saved in their places, frozen.

    Of a matrix that is saved whole, all rows beyond those of the base are the adapter's, whether they trained or not.
    """
    found: dict[str, dict[int, Tensor]] = {}
    for path, ids in tokens.items():
        found[path] = dict(zip(ids, contents.rows[path], strict=True))
    for path, matrix in contents.matrices.items():
        beyond = [token for token in cast(CausalLM, model).new_tokens if token < len(matrix)]
        dtype = contents.rows.get(path, matrix).dtype
        found[path] = {token: matrix[token].to(dtype) for token in beyond} | found.get(path, {})
    put_rows(model, {path: sorted(rows) for path, rows in found.items()})
    for path, layer in row_layers(model):
        layer.rows.data = torch.stack([found[path][token] for token in sorted(found[path])]).to(layer.ids.device)
