"""Rows of embedding and output head for tokens that the pretrained weights do not know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tuner.models.decoder import Decoder


@torch.no_grad()
def add_rows(model: Decoder, tokens: Sequence[int]) -> None:
    """Give new tokens rows, in place: spare ones of the matrices where their ids are within V, else further ones.

    Each starts as the mean of all V rows of its matrix, made in fp32: what `resize_token_embeddings` of transformers
    draws, with a deviation of 3e-5 of that of the rows, is here the expectation itself, so that a run needs no random
    numbers for it. Spare rows too, since nobody has trained them: a row of zeros, as some models have there, is blown
    up by the norm behind it, and so is its gradient. A tied head stays tied.

    Args:
        model: loaded, frozen and without adapters.
        tokens: their ids.
    """
    if not tokens:
        return
    size = max(model.vocab_size, max(tokens) + 1)
    embedding, head = model.model.embed_tokens, model.lm_head
    embedding.weight = _with_means(embedding.weight, size, tokens)
    if not model.tied:
        head.weight = _with_means(head.weight, size, tokens)
    embedding.num_embeddings = head.out_features = model.vocab_size = size
    model.tie()
    model.config = replace(model.config, vocab_size=size)
    model.new_tokens = tuple(tokens)


def _with_means(weight_VD: Tensor, size: int, tokens: Sequence[int]) -> nn.Parameter:
    """A matrix of `size` rows: the old ones, and the mean of those for all further ones and for `tokens`."""
    mean_D = weight_VD.mean(dim=0, dtype=torch.float32).to(weight_VD.dtype)
    grown: Tensor = weight_VD
    if size > len(weight_VD):
        grown = torch.cat([weight_VD, mean_D.expand(size - len(weight_VD), -1)])
    grown[torch.tensor(tokens, device=grown.device)] = mean_D
    return nn.Parameter(grown, requires_grad=weight_VD.requires_grad)
