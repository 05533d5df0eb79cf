"""Text from a model, token by token, over a cache of keys and values."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tuner.models.cache import KVCache
from tuner.models.decoder import Decoder
from tuner.models.rope import context_of_short_factors


def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """The tokens that follow one prompt: `generate_batch` of it alone."""
    return generate_batch(
        model, [prompt], max_new_tokens=max_new_tokens, end_ids=end_ids, temperature=temperature, top_p=top_p, seed=seed
    )[0]


@torch.inference_mode()
def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """The tokens that follow each prompt, up to and without an end token, all written in the same forward passes.

    A prompt gets what it would get alone, to the rounding of sums: shorter ones are padded on the left, their positions
    count from their first token, and each is sampled by a generator of its own. (With `longrope` the longest text of
    the batch decides which factors hold, as in transformers.) A forward pass of few tokens takes the time of reading
    the weights, so two replies cost little more than one.

    Args:
        model: in any mode; it is evaluated and left as it was.
        prompts: token ids, at least one each.
        max_new_tokens: where to stop at the latest; the model's context is the other bound.
        end_ids: tokens that end the text; none: it goes on to the longest.
        temperature: 0 takes the likeliest token, larger values sample from softmax(logits / temperature).
        top_p: sample among the likeliest tokens whose probabilities sum to this (arXiv:1904.09751).
        seed: of the sampling, of every prompt.
    """
    replies = [_Reply(prompt, min(max_new_tokens, model.max_position_embeddings - len(prompt))) for prompt in prompts]
    rows = [reply for reply in replies if reply.open]
    if not rows:
        return [reply.written for reply in replies]
    device = model.lm_head.weight.device if hasattr(model.lm_head, "weight") else next(model.parameters()).device
    generators = [torch.Generator(device=device).manual_seed(seed) for _ in rows]
    longest = max(len(reply.prompt) for reply in rows)
    padding = [longest - len(reply.prompt) for reply in rows]
    room = longest + max(reply.room for reply in rows)
    padding_B = torch.tensor(padding, device=device) if any(padding) else None
    cache = KVCache(len(model.layers), room, padding_B)
    any_token = 0
    padded = [[any_token] * pads + list(reply.prompt) for pads, reply in zip(padding, rows, strict=True)]
    text = fed = torch.tensor(padded, device=device)
    short_context = context_of_short_factors(model.config.rope_scaling)
    was_training = model.training
    model.eval()
    try:
        while True:
            logits_BV = model.logits(model.hidden(fed, cache)[:, -1])
            chosen = [_choose(*row, temperature, top_p) for row in zip(logits_BV, generators, strict=True)]
            for reply, token in zip(rows, chosen, strict=True):
                reply.add(token, end_ids)
            if not any(reply.open for reply in rows):
                return [reply.written for reply in replies]
            fed = torch.tensor(chosen, device=device).unsqueeze(1)
            text = torch.cat([text, fed], dim=1)
            if cache.length == short_context:  # the first token of a longer text moves all those before it
                cache, fed = KVCache(len(model.layers), room, padding_B), text
    finally:
        model.train(was_training)


class _Reply:
    """What has been written after one prompt, and whether more may come."""

    def __init__(self, prompt: Sequence[int], room: int) -> None:
        self.prompt = prompt
        self.room = room
        self.written: list[int] = []
        self.open = room > 0

    def add(self, token: int, end_ids: Collection[int]) -> None:
        if self.open and token not in end_ids:
            self.written.append(token)
        self.open = self.open and token not in end_ids and len(self.written) < self.room


def _choose(logits_V: Tensor, generator: torch.Generator, temperature: float, top_p: float) -> int:
    if temperature == 0.0:
        return int(logits_V.argmax())
    probabilities, order = torch.softmax(logits_V.float() / temperature, dim=-1).sort(descending=True)
    beyond = probabilities.cumsum(-1) - probabilities >= top_p
    probabilities = probabilities.masked_fill(beyond, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
