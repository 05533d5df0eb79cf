"""Selective checkpointing of real layers: the same bits for less memory, and no large product computed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tests.memory.live_bytes import LiveBytes
from tuner.build import build_model, load_base
from tuner.keeping import kernel, product
from tuner.loop import add_gradients, backward
from tuner.memory.default import MemoryTechniques
from tuner.models.decoder import Decoder
from tuner.models.family import FAMILIES
from tuner.peft.full import Full
from tuner.peft.lora import LoRA
from tuner.quantization.nf4 import NF4
from tuner.quantization.none import NoQuantization
from tuner.types import Batch, Precision

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GEMMA2: dict[str, Any] = {
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LAYERS = 3
Key = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Run:
    """What is trained.

    Attributes:
        method: `full`, or a LoRA on `all` linear layers or on q and v (`some`).
        tokens: of a row; on a CPU explicit products in fp32 up to 128, the fused kernel above.
        documents: lengths of the documents of packed rows.
    """

    method: str
    tokens: int = 20
    family: str = "llama"
    nf4: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    documents: tuple[int, ...] | None = None


RUNS = {
    "full": Run("full"),
    "full-fused-attention": Run("full", tokens=150),
    "lora": Run("all"),
    "lora-some-dropout": Run("some", dropout=0.3),
    "lora-fused-attention-bf16": Run("all", tokens=530, dtype="bfloat16"),
    "qlora": Run("all", nf4=True),
    "qlora-some": Run("some", nf4=True),
    "gemma2": Run("all", family="gemma2"),
    "packed": Run("all", tokens=300, documents=(150, 140, 7)),
}


def built(run: Run, key: Key) -> Decoder:
    shape = {**SHAPE, **(GEMMA2 if run.family == "gemma2" else {})}
    dtype = getattr(torch, run.dtype)
    quantization = NF4(block_size=64, double_quant=True) if run.nf4 else NoQuantization()
    config = FAMILIES[run.family].from_hugging_face({**shape, "model_type": run.family}, None)
    base = load_base(config, dtype, torch.device("cpu"), 0, quantization)
    torch.manual_seed(0)
    modules: list[Any] = ["q_proj", "v_proj"] + (["k_proj", "output_proj"] if run.method == "all" else [])
    lora = LoRA("lora", 4, 8, run.dropout, modules, run.method == "all", False, False)
    peft = Full("full") if run.method == "full" else lora
    model = build_model(base, peft, Precision("of run", run.dtype), MemoryTechniques(key, False, False, False))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def batch(run: Run) -> Batch:
    tokens = torch.randint(0, 61, (2, run.tokens), generator=torch.Generator().manual_seed(1))
    documents = None if run.documents is None else [list(run.documents)] * 2
    return Batch(tokens, tokens, documents=documents)


def gradients(run: Run, key: Key) -> dict[str, Tensor]:
    """Loss and all gradients of one pass."""
    model = built(run, key)
    torch.manual_seed(1)
    (loss,) = add_gradients(model, [batch(run)])
    return {"loss": loss, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_loss_and_gradients_are_the_same_bits(run: Run) -> None:
    plain, selective = gradients(run, "none"), gradients(run, "selective")
    assert plain.keys() == selective.keys()
    assert len(plain) > 2 * LAYERS
    for name, value in plain.items():
        assert value.abs().max() > 0, name
        assert torch.equal(selective[name], value), name  # the same operations in the same order: no tolerance


def counted(run: Run, key: Key) -> tuple[int, int]:
    """Bytes alive after a forward pass, and matrix products of the backward pass behind it."""
    model, one = built(run, key), batch(run)
    with LiveBytes([*model.parameters(), *model.buffers()]) as counter:
        loss = model.hidden(one.tokens, documents=one.documents).square().mean()
        alive, counter.matmuls = counter.now, 0
        loss.backward()  # type: ignore[no-untyped-call]
    return alive, counter.matmuls


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("packed", "qlora-some")])
def test_it_takes_less_memory_than_none_and_less_time_than_full(name: str) -> None:
    """Of each of 7 linear layers in a layer, `full` does 1 product again, and of an adapter's 2 it does both."""
    run = RUNS[name]
    memory, products = zip(*(counted(run, key) for key in ("none", "selective", "full")), strict=True)
    assert memory[2] < memory[1] < 0.85 * memory[0]  # a packed layer without an adapter keeps nothing to begin with
    adapters = {"full": 0, "some": 2, "all": 7}[run.method] * LAYERS
    assert products[1] - products[0] == adapters  # x Aᵀ, of rank 4
    assert products[2] - products[1] >= 6 * LAYERS  # autograd stops before the last where nothing needs it


@pytest.mark.parametrize("key", ["none", "selective", "full"])
def test_an_adapter_on_a_frozen_base_trains(key: Key) -> None:
    """B starts at zero and moves: checkpointing does not cut the frozen embedding's output from the graph."""
    run = Run("all")
    model = built(run, key)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        backward(model, [batch(run)])
        optimizer.step()
        optimizer.zero_grad()
    moved = {name: bool(p.abs().max() > 0) for name, p in model.named_parameters() if name.endswith(".B")}
    assert len(moved) == 7 * LAYERS
    assert all(moved.values())
    assert all(not p.requires_grad and p.grad is None for p in model.model.embed_tokens.parameters())


def test_a_product_that_was_written_into_is_noticed() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _Doubled.apply(x).mul_(3).exp()  # type: ignore[no-untyped-call, no-any-return]

    model = nn.Module()
    model.layers = nn.ModuleList([Layer()])
    MemoryTechniques("selective", False, False, False).apply(model)
    out = model.layers[0](torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="was written into"):
        out.sum().backward()


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return product(lambda: x * 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


def test_nothing_is_kept_outside_of_such_a_layer() -> None:
    with kernel() as context:
        assert context is None
    assert float(product(lambda: torch.tensor(2.0))) == 2.0
