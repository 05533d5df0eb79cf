"""Rows of the embedding and the output head that train while the other rows stay frozen (`trainable_token_indices` of
PEFT).

The rows are a parameter [n, D] of their own, of which alone there is a gradient and optimizer state. The frozen matrix
holds their present values at their places, rounded to its dtype, so that looking up and making logits cost what they
cost without them, and what is computed is the plain model's. The layers stay an embedding and a linear layer with the
names and the `weight` they had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.peft.saved_modules import EMBEDDING, HEAD
from tuner.types import CausalLM

Tokens = Mapping[str, Sequence[int]]
"""Ids of tokens by the name of the matrix that has their rows."""


class _Lookup(torch.autograd.Function):
    """`weight[tokens]`, of which the rows `ids` are a parameter."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows_nD: Tensor, weight_VD: Tensor, ids_n: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, ids_n)
        ctx.dtype = rows_nD.dtype
        return F.embedding(tokens, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens, ids_n = ctx.saved_tensors
        tokens_N, grad_ND = tokens.reshape(-1), grads[0].reshape(-1, grads[0].shape[-1])
        place_N = torch.searchsorted(ids_n, tokens_N).clamp_max_(len(ids_n) - 1)
        found = (ids_n[place_N] == tokens_N).nonzero().squeeze(1)
        # Summed in fp32 by the operation that embeddings have, which adds in a fixed order on a GPU too.
        summed = torch.ops.aten.embedding_dense_backward(
            grad_ND[found].float(), place_N[found], len(ids_n), padding_idx=-1, scale_grad_by_freq=False
        )
        return None, summed.to(ctx.dtype), None, None


class _Logits(torch.autograd.Function):
    """`x weightᵀ`, of which the rows `ids` are a parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows_nD: Tensor, weight_VD: Tensor, ids_n: Tensor) -> Tensor:
        ctx.save_for_backward(x, ids_n)
        ctx.weight, ctx.dtype = weight_VD, rows_nD.dtype
        return F.linear(x, weight_VD.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, ids_n = ctx.saved_tensors
        grad_x = grads[0] @ ctx.weight.to(grads[0].dtype) if ctx.needs_input_grad[0] else None
        grad_rows = None
        if ctx.needs_input_grad[1]:
            x_ND, grad_Nn = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])[:, ids_n]
            grad_rows = (grad_Nn.t().float() @ x_ND.float()).to(ctx.dtype)
        return grad_x, grad_rows, None, None


class TokenRows(nn.Module):
    """What both layers share: `rows` [n, D], the master copy, and `ids` [n], ascending: their places in `weight`."""

    rows: nn.Parameter
    ids: Tensor

    def _take(self, weight_VD: Tensor, ids: Sequence[int]) -> None:
        self.weight = weight_VD
        self.register_buffer("ids", torch.tensor(ids, device=weight_VD.device), persistent=False)
        self.rows = nn.Parameter(weight_VD.detach()[self.ids].clone(), requires_grad=False)

    def current_weight(self) -> Tensor:
        """The whole matrix [V, D] with the present values of the rows."""
        # `.data`: between a forward pass and its backward pass the rows do not change, so neither does the matrix
        weight_VD: Tensor = cast(Any, self).weight.data
        return weight_VD.index_copy_(0, self.ids, self.rows.detach().to(weight_VD.dtype))


class RowsEmbedding(TokenRows, nn.Embedding):
    """An embedding whose rows `ids` train, tokens [...] -> [..., D].

    Args:
        base: the frozen embedding, whose matrix it takes over.
        ids: ascending.
    """

    def __init__(self, base: nn.Embedding, ids: Sequence[int]) -> None:
        nn.Embedding.__init__(self, base.num_embeddings, base.embedding_dim, _weight=base.weight, _freeze=True)
        self._take(base.weight, ids)

    def forward(self, tokens: Tensor) -> Tensor:
        return _Lookup.apply(tokens, self.rows, self.current_weight(), self.ids)  # type: ignore[no-any-return, no-untyped-call]


class RowsHead(TokenRows, nn.Linear):
    """An output head without a bias whose rows `ids` train, [..., D] -> [..., V].

    Args:
        base: the frozen head, whose matrix it takes over.
        ids: ascending.
    """

    def __init__(self, base: nn.Linear, ids: Sequence[int]) -> None:
        nn.Linear.__init__(self, base.in_features, base.out_features, bias=False, device="meta")
        self._take(base.weight, ids)

    def forward(self, x: Tensor) -> Tensor:
        return _Logits.apply(x, self.rows, self.current_weight(), self.ids)  # type: ignore[no-any-return, no-untyped-call]


def put_rows(model: nn.Module, ids: Tokens) -> None:
    """Give rows of embedding and head a frozen parameter of their own, in place.

    Args:
        model: its embedding and head are plain.
        ids: of the tokens, ascending, by the name of the matrix; a head that is the embedding has the rows of that.
    """
    lm = cast(Any, model)
    if wanted := ids.get(EMBEDDING):
        lm.model.embed_tokens = RowsEmbedding(lm.model.embed_tokens, wanted).train(model.training)
    if lm.tied and wanted:
        lm.lm_head = RowsHead(lm.lm_head, wanted).train(model.training)
        lm.lm_head.rows = lm.model.embed_tokens.rows
    elif wanted := ids.get(HEAD):
        lm.lm_head = RowsHead(lm.lm_head, wanted).train(model.training)


def train_new_tokens(model: nn.Module, matrices: Sequence[str] = (EMBEDDING, HEAD)) -> None:
    """Make the rows of tokens that are new to a frozen model train; without such tokens, nothing."""
    new = sorted(cast(CausalLM, model).new_tokens)
    if new:
        put_rows(model, {matrix: new for matrix in matrices})
        for _, layer in row_layers(model):
            layer.rows.requires_grad_(True)


def row_layers(model: nn.Module) -> Iterator[tuple[str, TokenRows]]:
    """Name and layer of each matrix with rows of its own; of a tied model, the embedding alone."""
    lm = cast(Any, model)
    if isinstance(embedding := lm.model.embed_tokens, TokenRows):
        yield EMBEDDING, embedding
    if isinstance(lm.lm_head, TokenRows) and not lm.tied:
        yield HEAD, lm.lm_head
