"""LoRA on a model: what it adapts and refuses, that it starts as the identity, and what trains."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.merging import plain_model
from tuner.build import cast_trainable, load_base
from tuner.errors import ModelError
from tuner.loop import backward
from tuner.models.decoder import Decoder
from tuner.models.linear import Linear
from tuner.models.llama import LlamaConfig
from tuner.peft.full import Full
from tuner.peft.lora import LoRA
from tuner.peft.lora_linear import Adapter, LoRALinear
from tuner.quantization.nf4 import NF4
from tuner.types import Batch, Precision

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(1))
BATCH = Batch(TOKENS, TOKENS)
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]


def llama(dtype: torch.dtype = torch.float32, *, nf4: bool = False, **changed: Any) -> Decoder:
    config = LlamaConfig.from_hugging_face({**SHAPE, **changed}, None)
    model = load_base(config, dtype, torch.device("cpu"), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # out of the range where a layer is nearly linear
    if nf4:
        NF4(block_size=64, double_quant=True).quantize(model)
    return model


def lora(**changed: Any) -> LoRA:
    keys = {
        "name": "lora",
        "lora_rank": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_attn_modules": ATTENTION,
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": False,
        "use_rslora": False,
    }
    return LoRA(**{**keys, **changed})


def adapters(model: nn.Module) -> dict[str, Adapter]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def randomize_b(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters(model).values():
        nn.init.normal_(adapter.B, std=0.3, generator=generator)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out = model(TOKENS)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", [False, True])
def test_it_starts_as_the_identity(nf4: bool, dtype: torch.dtype, training: bool) -> None:
    model = llama(dtype, nf4=nf4)
    before = logits(model)
    lora(apply_lora_to_output=True, lora_dropout=0.3).adapt(model)
    assert all((adapter.B == 0).all() for adapter in adapters(model).values())
    assert all(adapter.A.std() > 0 for adapter in adapters(model).values())
    assert torch.equal(logits(model.train(training)), before)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": False}, ["q_proj", "v_proj"]),
        ({"lora_attn_modules": ["output_proj"], "apply_lora_to_mlp": False}, ["o_proj"]),
        ({"lora_attn_modules": []}, ["gate_proj", "up_proj", "down_proj"]),
        ({"lora_attn_modules": ["k_proj"]}, ["k_proj", "gate_proj", "up_proj", "down_proj"]),
    ],
)
@pytest.mark.parametrize("output", [False, True])
def test_only_what_is_declared_trains(keys: dict[str, Any], names: list[str], output: bool) -> None:
    model = llama()
    lora(**keys, apply_lora_to_output=output).adapt(model)
    adapted = {slot.path for slot in model.linears() if isinstance(slot.module, LoRALinear)}
    assert {path.rpartition(".")[2] for path in adapted} == {*names, *(["lm_head"] if output else [])}
    assert len(adapted) == len(adapters(model)) == 2 * len(names) + output
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{part}" for name in adapters(model) for part in ("A", "B")}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step moves B only, for its gradient alone is not zero
        backward(model, [BATCH])
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == trained
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in trained)


def test_full_training_trains_everything_the_tied_matrix_once() -> None:
    for tied in (False, True):
        model = llama(tie_word_embeddings=tied, attention_bias=True)
        Full("full").adapt(model)
        assert all(parameter.requires_grad for parameter in model.parameters())
        backward(model, [BATCH])
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert len(list(model.parameters())) == len(model.state_dict()) - tied


def test_nothing_to_adapt_is_refused() -> None:
    with pytest.raises(ModelError, match=r"LoRA matches no layer: \[\] chosen, the model has \['k_proj', 'mlp'"):
        lora(lora_attn_modules=[], apply_lora_to_mlp=False).adapt(llama())


@pytest.mark.parametrize(("rank", "fits"), [(16, True), (17, False)])
def test_a_rank_above_a_layers_size_is_refused(rank: int, fits: bool) -> None:
    """k_proj is [16 x 32]: two key heads of size 8."""
    if fits:
        lora(lora_rank=rank).adapt(llama())
        return
    with pytest.raises(ModelError, match=r"peft.lora_rank=17 is larger than .*layers.0.self_attn.k_proj \[16 x 32\]"):
        lora(lora_rank=rank).adapt(llama())


def test_an_adapter_on_a_tied_head_is_refused() -> None:
    with pytest.raises(ModelError, match=r"apply_lora_to_output=true: the output head of this model is its embedding"):
        lora(apply_lora_to_output=True).adapt(llama(tie_word_embeddings=True))


def test_merging_an_adapted_tied_head_unties_it() -> None:
    model = llama(tie_word_embeddings=True)
    adapter = Adapter(32, 61, 2, 4.0, 0.0, False)
    model.lm_head = LoRALinear(model.lm_head, {"default": adapter})  # type: ignore[assignment]
    randomize_b(model)
    before, embedding = logits(model), model.model.embed_tokens.weight.clone()
    model = plain_model(model, torch.float32)
    assert (logits(model) - before).abs().max() <= 1e-4
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not model.tied
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_the_scale(rslora: bool, scale: float) -> None:
    model = llama()
    lora(use_rslora=rslora).adapt(model)
    randomize_b(model)
    for slot in model.linears():
        layer = slot.module
        if not isinstance(layer, LoRALinear):
            assert slot.role == "output"
            continue
        adapter, base = layer.adapters["default"], layer.base
        expected = base.weight.double() + scale * (adapter.B.double() @ adapter.A.double())
        assert (layer.merged_weight().double() - expected).abs().max() <= 1e-6  # of weights below 4
        x = torch.randn(5, base.in_features)
        assert (layer(x).double() - x.double() @ expected.t()).abs().max() <= 2e-5  # of values below 20


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_merged_is_unmerged(nf4: bool) -> None:
    model = llama(nf4=nf4, attention_bias=True)
    lora(apply_lora_to_output=True).adapt(model)
    randomize_b(model)
    before, parameters = logits(model), {slot.path for slot in model.linears()}
    model = plain_model(model, torch.float32)
    assert {slot.path for slot in model.linears() if type(slot.module) in (nn.Linear, Linear)} == parameters
    assert (logits(model) - before).abs().max() <= 1e-4  # of logits up to 30


def test_merging_rounds_once() -> None:
    """To bf16 from the fp32 sum: W + delta rounded, where rounding delta first would lose it."""
    model = llama(torch.bfloat16)
    lora().adapt(model)
    randomize_b(model)
    expected = {
        s.path: s.module.merged_weight().bfloat16() for s in model.linears() if isinstance(s.module, LoRALinear)
    }
    assert len(expected) == 14
    model = plain_model(model, torch.bfloat16)
    assert all(torch.equal(model.get_submodule(path).weight, weight) for path, weight in expected.items())


def test_parameters_keep_the_dtype_that_trains() -> None:
    for trainable, dtype in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = llama(torch.bfloat16, nf4=True)
        lora().adapt(model)
        cast_trainable(model, Precision("bf16", "bfloat16", trainable))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        assert logits(model).dtype == torch.bfloat16
        backward(model, [BATCH])
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {dtype}


def test_dropout_is_off_in_evaluation_and_right_on_average_in_training() -> None:
    model = llama()
    lora(lora_dropout=0.4).adapt(model)
    randomize_b(model)
    layer = model.layers[0].mlp.up_proj
    assert isinstance(layer, LoRALinear)
    torch.manual_seed(0)
    x, draws = torch.randn(6, 32), 4000
    with torch.no_grad():
        exact = layer.eval()(x)
        assert torch.equal(layer(x), exact)
        layer.train()
        outputs = torch.stack([layer(x) for _ in range(draws)])
    assert (outputs.std(0) > 0).all()
    off = (outputs.mean(0) - exact).abs() / (outputs.std(0) / math.sqrt(draws))
    assert off.max() < 5  # standard errors, over 384 entries
    # and the base's part is never dropped: with B at zero nothing varies
    nn.init.zeros_(layer.adapters["default"].B)
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_gradients_over_nf4_are_those_over_the_dequantized_weights(nf4: bool) -> None:
    """And the base gets none; `dense` shows that the comparison itself is exact."""
    quantized = llama(nf4=nf4, attention_bias=True)
    dense = llama(nf4=nf4, attention_bias=True)
    dense = plain_model(dense, torch.float32)  # no adapter yet: packed layers become dense ones
    results = []
    for model in (quantized, dense):
        torch.manual_seed(5)
        lora(apply_lora_to_output=True).adapt(model)
        randomize_b(model)
        loss = backward(model.train(), [BATCH])
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, found), (expected_loss, expected) = results
    assert loss == expected_loss
    assert found.keys() == expected.keys() == {f"{n}.{part}" for n in adapters(quantized) for part in ("A", "B")}
    # The same products of the same numbers: not even a rounding differs.
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert all(p.grad is None and not p.requires_grad for n, p in quantized.named_parameters() if n not in found)
