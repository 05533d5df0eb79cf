"""Rows of new tokens: what trains, what stays as it is to the bit, and what it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tuner.build import UNQUANTIZED, build_model, count_from_config, count_parameters, load_base
from tuner.checkpoint.snapshot import trainable
from tuner.errors import ModelError
from tuner.loop import backward
from tuner.memory.default import MemoryTechniques
from tuner.models.decoder import Decoder
from tuner.models.llama import LlamaConfig
from tuner.peft.full import Full
from tuner.peft.lora import LoRA
from tuner.peft.token_rows import RowsEmbedding, RowsHead, row_layers
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
NEW = [59, 60, 61, 62]
TOKENS = torch.randint(0, 63, (3, 120), generator=torch.Generator().manual_seed(1))
BATCH = Batch(TOKENS, TOKENS)
PRECISIONS = {"fp32": Precision("fp32", "float32"), "bf16": Precision("bf16", "bfloat16")}
CPU = torch.device("cpu")


def lora(**changed: Any) -> LoRA:
    keys = {"apply_lora_to_mlp": True, "apply_lora_to_output": False, "use_rslora": False}
    return LoRA("lora", 4, 8.0, 0.0, ["q_proj", "v_proj"], **{**keys, **changed})


def learning(
    precision: str = "fp32", *, tied: bool = False, peft: Any = None, nf4: bool = False, new: list[int] = NEW
) -> Decoder:
    config = LlamaConfig.from_hugging_face({**SHAPE, "tie_word_embeddings": tied}, None)
    dtype = getattr(torch, PRECISIONS[precision].compute)
    base = load_base(config, dtype, CPU, 3, NF4(64, double_quant=True) if nf4 else UNQUANTIZED, new)
    torch.manual_seed(5)
    model = build_model(base, peft or lora(), PRECISIONS[precision], MemoryTechniques("none", False, False, False))
    return model


def stepped(model: Decoder, steps: int = 3) -> Decoder:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        backward(model, [BATCH])
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_rows_train_and_the_others_stay_to_the_bit(tied: bool, precision: str, nf4: bool) -> None:
    model = learning(precision, tied=tied, nf4=nf4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stepped(model)
    old = torch.ones(63, dtype=torch.bool)
    old[NEW] = False
    for name, now in model.state_dict().items():
        was = before[name]
        if name.endswith("embed_tokens.weight") or name == "lm_head.weight":
            assert torch.equal(now[old], was[old])
            assert (now[NEW] != was[NEW]).any(dim=-1).all()
        else:
            trains = name.endswith((".A", ".B", ".rows"))
            assert torch.equal(now, was) is not trains
    layers = dict(row_layers(model))
    assert set(layers) == {"model.embed_tokens"} | (set() if tied else {"lm_head"})
    assert all(layer.rows.dtype == torch.float32 for layer in layers.values())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_are_those_of_full_training_at_these_rows(tied: bool, softcap: float | None) -> None:
    whole, rows = learning(tied=tied, peft=Full("full")), learning(tied=tied)
    for model in (whole, rows):
        model.logit_softcap = softcap
    assert backward(rows, [BATCH, BATCH]) == pytest.approx(backward(whole, [BATCH, BATCH]), abs=1e-6)
    for path, layer in row_layers(rows):
        full = whole.get_parameter(f"{path}.weight").grad
        assert isinstance(full, Tensor)
        assert layer.rows.grad is not None
        assert full[NEW].abs().max() > 1e-3
        assert torch.allclose(layer.rows.grad, full[NEW], atol=1e-6, rtol=1e-4)


def test_gradients_and_state_have_the_size_of_the_rows() -> None:
    model = learning()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    backward(model, [BATCH])
    optimizer.step()
    assert model.lm_head.weight.grad is None
    assert model.model.embed_tokens.weight.grad is None
    assert {tuple(p.shape) for p in trained if p.shape[0] in (61, 63)} == set()
    for path in ("model.embed_tokens", "lm_head"):
        rows = model.get_parameter(f"{path}.rows")
        assert rows.grad is not None
        assert rows.grad.shape == optimizer.state[rows]["exp_avg"].shape == (4, 32)


def test_a_batch_without_new_tokens_has_a_gradient_of_zeros_for_the_embedding() -> None:
    model = learning()
    tokens = TOKENS % 59
    backward(model, [Batch(tokens, tokens)])
    assert isinstance(embedding := model.model.embed_tokens, RowsEmbedding)
    assert embedding.rows.grad is not None
    assert not embedding.rows.grad.any()
    assert isinstance(model.lm_head, RowsHead)
    assert model.lm_head.rows.grad is not None
    assert model.lm_head.rows.grad.any()  # they are what the other tokens are told from


def test_what_is_evaluated_is_what_the_rows_are_now() -> None:
    model = stepped(learning("bf16"))
    logits = model.eval()(TOKENS)
    plain = learning("bf16", peft=Full("full"))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".rows")}
    for path, layer in row_layers(model):
        state[f"{path}.weight"] = state[f"{path}.weight"].clone()
        state[f"{path}.weight"][NEW] = layer.rows.detach().bfloat16()
    lora().adapt(plain.eval())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        plain.get_parameter(name).data.copy_(state[name])
        plain.get_parameter(name.replace("weight", "rows")).data.copy_(state[name][NEW].float())
    plain.load_state_dict(state, strict=False)
    assert torch.equal(plain(TOKENS), logits)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("new", [[], [60], NEW], ids=len)
def test_counts_are_those_of_the_grown_model(tied: bool, new: list[int]) -> None:
    model = learning(tied=tied, new=new)
    size = max(61, *(token + 1 for token in new), 0)
    plain = LlamaConfig.from_hugging_face({**SHAPE, "vocab_size": size, "tie_word_embeddings": tied}, None)
    total, trainable = count_from_config(plain, UNQUANTIZED, lora())
    assert count_parameters(model) == (total, trainable + len(new) * 32 * (1 if tied else 2))


def test_a_checkpoint_holds_the_rows_and_no_matrix() -> None:
    model = learning(tied=True)
    tensors = trainable(model)
    assert tensors["model.embed_tokens.rows"].shape == (4, 32)
    assert not [name for name in tensors if name.endswith("weight")]


def test_an_adapter_on_the_head_is_refused() -> None:
    with pytest.raises(ModelError, match="apply_lora_to_output=true: the output head gets rows"):
        learning(peft=lora(apply_lora_to_output=True))
