"""Greedy text equals transformers'; the cache changes nothing; sampling follows its seed and its distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tuner
from tuner.generation import _choose, generate, generate_batch
from tuner.models.cache import KVCache
from tuner.models.decoder import Decoder
from tuner.peft.lora import LoRA

Folder = Callable[..., Path]
NEVER: frozenset[int] = frozenset()
PROMPT = [5, 17, 99, 3, 3, 42]


def model_of(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    model = tuner.load_model(folder, dtype=dtype)
    assert isinstance(model, Decoder)
    return model


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 9}),
    "gemma": ("gemma", {"head_dim": 14}),
    "gemma2": ("gemma2", {"head_dim": 14, "sliding_window": 9}),
    "phi3": ("phi3", {"sliding_window": 9}),
    "phi3, long rope": (  # whose factors change while it writes
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [1.0, 2.0, 3.0, 4.0],
            },
            "original_max_position_embeddings": 40,
        },
    ),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 14}),
}


@pytest.mark.parametrize(("family", "shape"), SHAPES.values(), ids=SHAPES)
def test_64_greedy_tokens_are_transformers(
    family: str, shape: dict[str, Any], family_folder: Folder, reference: Callable[..., Any]
) -> None:
    folder = family_folder(family, **shape)
    theirs = reference(folder)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=64, do_sample=False, pad_token_id=0)
    found = generate(model_of(folder), PROMPT, max_new_tokens=64, end_ids=NEVER)
    assert found == expected[0, len(PROMPT) :].tolist()
    assert len(found) == 64
    assert len(set(found)) > 3  # not one token over and over


@pytest.mark.slow
@pytest.mark.parametrize(("family", "shape"), SHAPES.values(), ids=SHAPES)
def test_prompts_of_a_batch_are_answered_as_by_transformers(
    family: str, shape: dict[str, Any], family_folder: Folder, reference: Callable[..., Any]
) -> None:
    """Padded on the left, as both do."""
    folder = family_folder(family, **shape)
    theirs = reference(folder)
    theirs.generation_config.eos_token_id = None
    prompts = [PROMPT, list(range(40, 53))]
    padded = torch.tensor([[0] * 7 + PROMPT, prompts[1]])
    mask = torch.tensor([[0] * 7 + [1] * 6, [1] * 13])
    expected = theirs.generate(padded, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
    found = generate_batch(model_of(folder), prompts, max_new_tokens=40, end_ids=NEVER)
    assert found == expected[:, 13:].tolist()


@pytest.mark.parametrize("parts", [(20,), (6, 1, 1, 1, 11), (1,) * 20])
def test_the_cache_changes_nothing(parts: tuple[int, ...], llama_folder: Folder) -> None:
    model = model_of(llama_folder())
    tokens = torch.randint(0, 131, (3, 20), generator=torch.Generator().manual_seed(0))
    cache = KVCache(len(model.layers), 20)
    with torch.no_grad():
        pieces = [model.hidden(piece, cache) for piece in tokens.split(parts, dim=1)]
        whole = model.hidden(tokens)
    assert cache.length == 20
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 2e-5  # of values up to 4: another order of the same sums


def test_without_a_cache_the_same_tokens_are_chosen(llama_folder: Folder) -> None:
    model = model_of(llama_folder())
    text = list(PROMPT)
    with torch.no_grad():
        for _ in range(30):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert generate(model, PROMPT, max_new_tokens=30, end_ids=NEVER) == text[len(PROMPT) :]


def test_it_stops_before_the_end_token(llama_folder: Folder) -> None:
    model = model_of(llama_folder())
    free = generate(model, PROMPT, max_new_tokens=20, end_ids=NEVER)
    eos = free[7]
    assert generate(model, PROMPT, max_new_tokens=20, end_ids={eos}) == free[: free.index(eos)]


def test_it_stops_at_the_end_of_the_context(llama_folder: Folder) -> None:
    model = model_of(llama_folder(max_position_embeddings=16))
    assert len(generate(model, PROMPT, max_new_tokens=64, end_ids=NEVER)) == 10
    assert generate(model, list(range(16)), max_new_tokens=64, end_ids=NEVER) == []
    assert generate(model, list(range(20)), max_new_tokens=64, end_ids=NEVER) == []


PROMPTS = [PROMPT, [7], list(range(40, 53)), [9, 9, 9]]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_prompts_of_unequal_length_are_answered_as_each_alone(temperature: float, llama_folder: Folder) -> None:
    model = model_of(llama_folder())
    how: dict[str, Any] = {"max_new_tokens": 24, "temperature": temperature, "top_p": 0.95, "seed": 3}
    alone = [generate(model, prompt, end_ids=NEVER, **how) for prompt in PROMPTS]
    assert len({tuple(reply) for reply in alone}) == len(PROMPTS)
    assert generate_batch(model, PROMPTS, end_ids=NEVER, **how) == alone
    eos = alone[1][5]  # one ends early, the others go on
    cut = [reply[: reply.index(eos)] if eos in reply else reply for reply in alone]
    assert len({len(reply) for reply in cut}) > 1
    assert generate_batch(model, PROMPTS, end_ids={eos}, **how) == cut


def test_each_row_of_a_batch_has_its_own_room(llama_folder: Folder) -> None:
    model = model_of(llama_folder(max_position_embeddings=16))
    batch = [list(range(20)), PROMPT, list(range(14)), list(range(16))]
    found = generate_batch(model, batch, max_new_tokens=64, end_ids=NEVER)
    assert [len(reply) for reply in found] == [0, 10, 2, 0]
    assert found[1] == generate(model, PROMPT, max_new_tokens=64, end_ids=NEVER)
    assert generate_batch(model, [], max_new_tokens=64, end_ids=NEVER) == []


def test_the_models_mode_is_left_as_it_was_and_dropout_is_off(llama_folder: Folder) -> None:
    model = model_of(llama_folder(tie_word_embeddings=False))
    keys = {"lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.9, "lora_attn_modules": ["q_proj"]}
    LoRA("lora", **keys, apply_lora_to_mlp=True, apply_lora_to_output=True, use_rslora=False).adapt(model)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)
    written = set()
    for training in (True, False):
        model.train(training)
        written.add(tuple(generate(model, PROMPT, max_new_tokens=20, end_ids=NEVER)))
        assert model.training is training
        assert all(module.training is training for module in model.modules())
    assert len(written) == 1


def test_sampling_follows_its_seed_and_no_other(llama_folder: Folder) -> None:
    model = model_of(llama_folder())

    def sampled(seed: int) -> list[int]:
        return generate(model, PROMPT, max_new_tokens=24, end_ids=NEVER, temperature=1.5, top_p=0.95, seed=seed)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sampled(7)
    assert torch.equal(torch.get_rng_state(), state)  # training goes on as if nothing had been written
    torch.manual_seed(2)
    assert sampled(7) == first
    assert sampled(8) != first


def test_a_tiny_top_p_is_greedy(llama_folder: Folder) -> None:
    model = model_of(llama_folder())
    greedy = generate(model, PROMPT, max_new_tokens=20, end_ids=NEVER)
    assert generate(model, PROMPT, max_new_tokens=20, end_ids=NEVER, temperature=3.0, top_p=1e-6, seed=3) == greedy


@pytest.mark.slow
def test_sampled_frequencies_are_the_distributions() -> None:
    """p = .5 .3 .15 .05: top_p=0.6 leaves the first two, as .625 and .375; temperature 2 takes square roots."""
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    generator = torch.Generator().manual_seed(0)
    draws = 4000

    def frequencies(temperature: float, top_p: float) -> list[float]:
        counts = Counter(_choose(logits, generator, temperature, top_p) for _ in range(draws))
        return [counts[token] / draws for token in range(4)]

    off = 0.03  # four standard deviations of a frequency: 4 * sqrt(.25 / 4000)
    assert frequencies(1.0, 1.0) == pytest.approx([0.05, 0.5, 0.15, 0.3], abs=off)
    assert frequencies(1.0, 0.6) == pytest.approx([0.0, 0.625, 0.0, 0.375], abs=off)
    assert frequencies(1.0, 0.6)[0] == frequencies(1.0, 0.6)[2] == 0
    roots = logits.div(2).exp()
    assert frequencies(2.0, 1.0) == pytest.approx((roots / roots.sum()).tolist(), abs=off)
