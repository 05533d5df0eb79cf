"""Text from a model, token by token, over a cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tuner.models.cache import KVCache
from tuner.models.llama import Llama


@torch.inference_mode()
def generate(
    model: Llama,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """The tokens that follow `prompt`, up to and without the end token.

    Args:
        model: in any mode; it is evaluated and left as it was.
        prompt: token ids, at least one.
        max_new_tokens: where to stop at the latest; the model's context is the other bound.
        eos_id: the token that ends the text.
        temperature: 0 takes the likeliest token, larger values sample from softmax(logits / temperature).
        top_p: sample among the likeliest tokens whose probabilities sum to this (arXiv:1904.09751).
        seed: of the sampling.
    """
    device = model.lm_head.weight.device if hasattr(model.lm_head, "weight") else next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    room = min(max_new_tokens, model.max_position_embeddings - len(prompt))
    cache = KVCache(len(model.layers), len(prompt) + max(room, 0))
    fed = torch.tensor([list(prompt)], device=device)
    written: list[int] = []
    was_training = model.training
    model.eval()
    try:
        while len(written) < room:
            logits_V = model.lm_head(model.hidden(fed, cache)[0, -1])
            token = _choose(logits_V, temperature, top_p, generator)
            if token == eos_id:
                break
            written.append(token)
            fed = torch.tensor([[token]], device=device)
    finally:
        model.train(was_training)
    return written


def _choose(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits_V.argmax())
    probabilities, order = torch.softmax(logits_V.float() / temperature, dim=-1).sort(descending=True)
    beyond = probabilities.cumsum(-1) - probabilities >= top_p
    probabilities = probabilities.masked_fill(beyond, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
