"""DoRA's layer against its composed form: values, gradients, what it keeps, and the magnitudes of stacked layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tuner.build import load_base
from tuner.errors import ModelError
from tuner.models.decoder import Decoder
from tuner.models.phi3 import Phi3Config
from tuner.peft.adapted import adapted_layers, dense_weight
from tuner.peft.adapter_folder import load_adapter
from tuner.peft.adapter_writing import save_adapter
from tuner.peft.dora import DoRA, DoRAAdapter
from tuner.peft.lora_linear import Adapter, LoRALinear
from tuner.quantization.nf4 import NF4Linear

IN, OUT, R = 24, 40, 5
OFF = {torch.float32: 4e-6, torch.bfloat16: 2e-2}
"""Of the largest entry: some ulp (1.2e-7) of fp32; five roundings (3.9e-3) of bf16."""


def layer_of(
    *, dtype: torch.dtype = torch.float32, bias: bool = True, dropout: float = 0.0, nf4: bool = False
) -> LoRALinear:
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(IN, OUT, bias=bias).to(dtype).requires_grad_(False)
    if nf4:
        assert isinstance(base, nn.Linear)
        base = NF4Linear.from_linear(base, block_size=64, double_quant=True)
    layer = LoRALinear(base, {"default": DoRAAdapter(IN, OUT, R, 7.0, dropout, False)}).begin()
    adapter: Any = layer.adapters["default"]
    nn.init.normal_(adapter.B, std=0.1)
    with torch.no_grad():
        adapter.magnitude.mul_(1 + 0.2 * torch.randn(OUT))
    return layer


def composed(layer: LoRALinear, x: Tensor) -> Tensor:
    """The equation itself in fp32, from the same numbers as the compute dtype has them; the norm is a constant."""
    adapter: Any = layer.adapters["default"]
    weight = dense_weight(layer.base).float()
    norms = (weight + adapter.scale * adapter.B @ adapter.A).norm(dim=1).detach()
    dropped = F.dropout(x, adapter.dropout, layer.training)
    u = F.linear(x, weight) + adapter.scale * (dropped @ adapter.A.t()) @ adapter.B.t()
    out = adapter.magnitude / norms * u
    return out if layer.base.bias is None else out + layer.base.bias.float()  # type: ignore[operator]


def output_and_gradients(function: Any, layer: LoRALinear, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(9)  # of dropout
    out = function(leaf)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype))
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": leaf.grad, **gradients}  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", OFF, ids=["fp32", "bf16"])
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, IN), (3, IN), (IN,), (1, 1, 1, IN)])
def test_values_and_gradients(dtype: torch.dtype, nf4: bool, bias: bool, shape: tuple[int, ...]) -> None:
    layer = layer_of(dtype=dtype, nf4=nf4, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = output_and_gradients(layer, layer, x)
    theirs = output_and_gradients(lambda x: composed(layer, x), layer, x.float())
    assert ours.keys() == theirs.keys()
    assert {name.rpartition(".")[2] for name in ours} == {"out", "x", "A", "B", "magnitude"}
    assert ours["out"].dtype == ours["x"].dtype == dtype
    assert ours["adapters.default.magnitude"].dtype == torch.float32
    for name, exact in theirs.items():
        assert ours[name].shape == exact.shape
        assert (ours[name].float() - exact).abs().max() <= OFF[dtype] * exact.abs().max(), name


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_on_the_input_of_a(training: bool) -> None:
    layer = layer_of(dropout=0.3).train(training)
    x = torch.randn(4, 6, IN)
    ours = output_and_gradients(layer, layer, x)
    theirs = output_and_gradients(lambda x: composed(layer, x), layer, x)
    for name, exact in theirs.items():
        assert (ours[name] - exact).abs().max() <= OFF[torch.float32] * exact.abs().max(), name


def test_an_input_that_needs_no_gradient() -> None:
    layer = layer_of(dropout=0.5).train()
    layer(torch.randn(4, IN)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.adapters.parameters())
    assert layer.base.weight.grad is None


def test_it_keeps_no_more_than_it_says() -> None:
    """The input, its projection, u, A, B and vectors: no product [out, in], and not the weight made dense."""
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    layer, x = layer_of(nf4=True, dtype=torch.bfloat16), torch.randn(2, 9, IN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sorted(kept) == sorted([(18, IN), (18, R), (18, OUT), (R, IN), (OUT, R), (OUT,), (OUT,)])


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_norms_without_the_product_are_those_of_the_product(size: float) -> None:
    """Also where the adapter is larger than the weight, and where it takes most of a row away."""
    layer = layer_of()
    adapter: Any = layer.adapters["default"]
    with torch.no_grad():
        adapter.B.mul_(size)
        weight = dense_weight(layer.base)
        adapter.A[0] = weight[3] / adapter.scale
        adapter.B[3] = torch.tensor([-0.9, 0, 0, 0, 0])
        exact = (weight.double() + adapter.scale * adapter.B.double() @ adapter.A.double()).norm(dim=1)
        assert torch.allclose(adapter.norms(weight).double(), exact, rtol=3e-5, atol=0)


def test_a_row_of_zeros_stays_one() -> None:
    base = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    base.weight[2] = 0
    layer = LoRALinear(base, {"default": DoRAAdapter(IN, OUT, R, 7.0, 0.0, False)}).begin()
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.adapters.parameters())  # type: ignore[union-attr]


def test_compiles_without_a_graph_break() -> None:
    layer, x = layer_of(), torch.randn(4, IN)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    ours, eager = (output_and_gradients(function, layer, x) for function in (compiled, layer))
    assert all(torch.equal(ours[name], value) for name, value in eager.items())


def test_it_is_the_only_adapter_of_its_layer() -> None:
    adapters = {"one": DoRAAdapter(IN, OUT, R, 1.0, 0.0, False), "two": Adapter(IN, OUT, R, 1.0, 0.0, False)}
    with pytest.raises(ModelError, match="the only one of its layer"):
        LoRALinear(nn.Linear(IN, OUT), adapters)


def phi3() -> Decoder:
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = Phi3Config.from_hugging_face({**shape, "num_attention_heads": 4, "num_key_value_heads": 2}, None)
    return load_base(config, torch.float32, torch.device("cpu"), seed=3)


def test_stacked_layers_of_which_some_are_adapted(tmp_path: Path) -> None:
    """q and v of one matrix: k gets the magnitudes that it has, and is not adapted when it is read again."""
    model = phi3()
    DoRA("dora", 4, 8, 0.0, ["q_proj", "v_proj"], False, False, False).adapt(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, tmp_path, base=None, extra={})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_magnitude_vector"
    keys = model.layers[1].self_attn.k_proj  # type: ignore[union-attr]
    assert torch.allclose(tensors[name][32:48], keys.weight.norm(dim=1), rtol=1e-6)  # type: ignore[union-attr, operator]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["qkv_proj"]
    again = phi3()
    load_adapter(again, tmp_path)
    ours, theirs = dict(adapted_layers(model)), dict(adapted_layers(again))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 4
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))
        # A magnitude that trained where no direction did is kept, with an adapter that does nothing.
        tensors[name][32:48] *= 1.5
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "adapter_model.safetensors")
    third = phi3()
    load_adapter(third, tmp_path)
    assert set(dict(adapted_layers(third))) - set(ours) == {"model.layers.1.self_attn.k_proj"}
    k: Any = dict(adapted_layers(third))["model.layers.1.self_attn.k_proj"]
    assert torch.allclose(k.merged_weight(), 1.5 * keys.weight, rtol=1e-5)  # type: ignore[union-attr, operator]
