"""The parts that parameters have in a model, and the groups that are made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tuner.build import build_optimizer, load_base
from tuner.config import compose
from tuner.errors import ConfigError
from tuner.loop import training_steps
from tuner.models.decoder import Decoder
from tuner.models.qwen2 import Qwen2Config
from tuner.optimizers.groups import Role, Trained, groups, trained
from tuner.peft.lora import LoRA
from tuner.types import Batch, State

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def model(*, lora: bool, tied: bool = False, new_tokens: tuple[int, ...] = (), output: bool = False) -> Decoder:
    """One block with biases of queries, keys and values; of LoRA on queries, or all of it trains."""
    config = Qwen2Config.from_hugging_face({**SHAPE, "tie_word_embeddings": tied}, None)
    made = load_base(config, torch.float32, torch.device("cpu"), 0, new_tokens=new_tokens)
    if lora:
        LoRA("lora", 4, 8, 0.0, ["q_proj"], False, output, False).adapt(made)
    return made if lora else made.requires_grad_(True)


def roles(made: Decoder) -> dict[str, str]:
    return {one.name.replace("model.layers.0.", ""): one.role for one in trained(made)}


BLOCK = {
    "self_attn.q_proj.weight": "matrices",
    "self_attn.q_proj.bias": "biases",
    "self_attn.k_proj.weight": "matrices",
    "self_attn.k_proj.bias": "biases",
    "self_attn.v_proj.weight": "matrices",
    "self_attn.v_proj.bias": "biases",
    "self_attn.o_proj.weight": "matrices",
    "mlp.gate_proj.weight": "matrices",
    "mlp.up_proj.weight": "matrices",
    "mlp.down_proj.weight": "matrices",
    "input_layernorm.weight": "norms",
    "post_attention_layernorm.weight": "norms",
    "model.norm.weight": "norms",
}
AB = {"self_attn.q_proj.adapters.default.A": "A", "self_attn.q_proj.adapters.default.B": "B"}


def test_every_parameter_that_trains_has_its_part() -> None:
    ends = {"model.embed_tokens.weight": "embeddings", "lm_head.weight": "head"}
    assert roles(model(lora=False)) == {**ends, **BLOCK}
    assert roles(model(lora=False, tied=True)) == {"model.embed_tokens.weight": "embeddings", **BLOCK}
    assert roles(model(lora=True)) == AB
    head = {"lm_head.adapters.default.A": "A", "lm_head.adapters.default.B": "B"}
    assert roles(model(lora=True, output=True)) == {**AB, **head}
    rows = {"model.embed_tokens.rows": "embeddings", "lm_head.rows": "head"}
    assert roles(model(lora=True, new_tokens=(61, 62))) == {**AB, **rows}
    assert roles(model(lora=True, tied=True, new_tokens=(61,))) == {"model.embed_tokens.rows": "embeddings", **AB}


ONE_OF_EACH: dict[Role, tuple[int, ...]] = {
    "biases": (3,),
    "B": (4, 2),
    "embeddings": (5, 3),
    "A": (2, 3),
    "norms": (4,),
    "matrices": (3, 4),
    "vectors": (2,),
    "head": (5, 4),
}


def one_of_each() -> list[Trained]:
    return [Trained(role, nn.Parameter(torch.ones(shape)), role) for role, shape in ONE_OF_EACH.items()]


OTHERS = ["embeddings", "A", "matrices", "head"]


@pytest.mark.parametrize(
    ("ratio", "no_decay", "expected"),
    [
        (None, [], [(["biases", "B", "embeddings", "A", "norms", "matrices", "vectors", "head"], {})]),
        (
            None,
            ["norms", "biases"],
            [
                (["B", "embeddings", "A", "matrices", "vectors", "head"], {}),
                (["biases", "norms"], {"weight_decay": 0.0}),
            ],
        ),
        (4.0, [], [(OTHERS, {}), (["biases", "B", "norms", "vectors"], {"lr": 2.0})]),
        (
            4.0,
            ["embeddings", "biases"],
            [
                (["A", "matrices", "head"], {}),
                (["embeddings"], {"weight_decay": 0.0}),
                (["B", "norms", "vectors"], {"lr": 2.0}),
                (["biases"], {"lr": 2.0, "weight_decay": 0.0}),
            ],
        ),
    ],
)
def test_groups(ratio: float | None, no_decay: Any, expected: list[tuple[list[str], dict[str, float]]]) -> None:
    params = one_of_each()
    names = {id(one.param): one.name for one in params}
    made = groups(params, 0.5, ratio, no_decay)
    found = [
        ([names[id(p)] for p in group["params"]], {k: v for k, v in group.items() if k != "params"}) for group in made
    ]
    assert found == expected


def test_lora_plus_without_what_it_is_about_is_refused() -> None:
    without = [one for one in one_of_each() if one.role != "B"]
    with pytest.raises(ConfigError, match=r"optimizer\.loraplus_lr_ratio=4\.0: LoRA\+ is about the matrices B"):
        groups(without, 0.5, 4.0, [])
    with pytest.raises(ConfigError, match=r"optimizer\.loraplus_lr_ratio=4\.0: of which rate\? say optimizer\.lr"):
        groups(one_of_each(), None, 4.0, [])
    assert len(groups(without, None, None, [])) == 1


class SameBatch:
    at_epoch_end = False

    def __next__(self) -> list[Batch]:
        tokens = torch.arange(8)[None]
        return [Batch(tokens, tokens)]


class Halved:
    def factor(self, step: int, total_steps: int) -> float:
        return 0.5 ** (step + 1)


@pytest.mark.parametrize("words", [["optimizer=adamw"], ["optimizer=custom", "optimizer._target_=torch.optim.RAdam"]])
def test_the_schedule_multiplies_the_rate_of_each_group(words: list[str]) -> None:
    cfg = compose([*words, "optimizer.lr=0.01", "optimizer.loraplus_lr_ratio=8", "optimizer.no_decay=[norms]"])
    made = model(lora=True)
    optimizer = build_optimizer(cfg.optimizer, trained(made), [])
    state = State(made, optimizer, SameBatch())  # type: ignore[arg-type]
    steps = training_steps(state, Halved(), total_steps=3, clip_grad_norm=1.0, device=torch.device("cpu"))
    for step, factor in zip(steps, (0.5, 0.25, 0.125), strict=True):
        assert step.lr == 0.01 * factor
        assert [group["lr"] for group in optimizer.param_groups] == [0.01 * factor, 0.08 * factor]
