"""The LoRA linear against its composed form: values, gradients, several adapters, odd shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.peft.adapted import dense_weight
from tuner.peft.lora_linear import Adapter, LoRALinear
from tuner.quantization.nf4 import NF4Linear

IN, OUT, R = 24, 40, 5
OFF = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}
"""Of the largest entry: some ulp (1.2e-7) of fp32; two roundings (7.8e-3) of bf16."""


def layer_of(
    *names: str, dtype: torch.dtype = torch.float32, bias: bool = True, dropout: float = 0.0, nf4: bool = False
) -> LoRALinear:
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(IN, OUT, bias=bias).to(dtype).requires_grad_(False)
    if nf4:
        assert isinstance(base, nn.Linear)
        base = NF4Linear.from_linear(base, block_size=64, double_quant=True)
    adapters = {name: Adapter(IN, OUT, R, 7.0, dropout, False) for name in names or ["default"]}
    for adapter in adapters.values():
        nn.init.normal_(adapter.B)
    return LoRALinear(base, adapters)


def composed(layer: LoRALinear, x: Tensor) -> Tensor:
    """In fp32, from the same numbers as the compute dtype has them."""
    bias = layer.base.bias
    out = F.linear(x, dense_weight(layer.base).float(), None if bias is None else bias.float())
    for adapter in layer.adapters.values():
        dropped = F.dropout(x, adapter.dropout, layer.training)
        out = out + adapter.scale * (dropped @ adapter.A.t()) @ adapter.B.t()
    return out


def output_and_gradients(function: object, layer: LoRALinear, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(9)  # of dropout
    out = function(leaf)  # type: ignore[operator]
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
    assert ours.keys() == theirs.keys() == {"out", "x", "adapters.default.A", "adapters.default.B"}
    assert ours["out"].dtype == ours["x"].dtype == dtype
    assert ours["adapters.default.A"].dtype == torch.float32
    for name, exact in theirs.items():
        assert ours[name].shape == exact.shape
        assert (ours[name].float() - exact).abs().max() <= OFF[dtype] * exact.abs().max(), name


@pytest.mark.parametrize("training", [True, False])
def test_dropout_drops_what_torchs_does(training: bool) -> None:
    layer = layer_of(dropout=0.3).train(training)
    x = torch.randn(4, 6, IN)
    ours = output_and_gradients(layer, layer, x)
    theirs = output_and_gradients(lambda x: composed(layer, x), layer, x)
    for name, exact in theirs.items():
        assert (ours[name] - exact).abs().max() <= OFF[torch.float32] * exact.abs().max(), name


def test_two_adapters_add_up_and_both_train() -> None:
    layer = layer_of("first", "second")
    x = torch.randn(4, IN)
    ours = output_and_gradients(layer, layer, x)
    theirs = output_and_gradients(lambda x: composed(layer, x), layer, x)
    assert ours.keys() == {"out", "x", *(f"adapters.{name}.{part}" for name in ("first", "second") for part in "AB")}
    for name, exact in theirs.items():
        assert (ours[name] - exact).abs().max() <= OFF[torch.float32] * exact.abs().max(), name
    alone = [LoRALinear(layer.base, {name: adapter}) for name, adapter in layer.adapters.items()]  # type: ignore[dict-item]
    assert torch.allclose(layer(x), alone[0](x) + alone[1](x) - layer.base(x), atol=1e-5)


def test_numerical_gradient() -> None:
    layer = layer_of().double()
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    adapter = layer.adapters["default"]

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"adapters.default.A": a, "adapters.default.B": b}, (x,))

    assert torch.autograd.gradcheck(function, (x, adapter.A, adapter.B))


def test_an_input_that_needs_no_gradient() -> None:
    layer, x = layer_of(dropout=0.5).train(), torch.randn(4, IN)
    layer(x).sum().backward()
    adapter = layer.adapters["default"]
    assert adapter.A.grad is not None
    assert adapter.B.grad is not None
    assert layer.base.weight.grad is None


def test_it_keeps_no_more_than_it_says() -> None:
    """The input, its projection, A and B: not the output, not the weight made dense."""
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    layer, x = layer_of(nf4=True, dtype=torch.bfloat16), torch.randn(2, 9, IN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sorted(kept) == sorted([(18, IN), (18, R), (R, IN), (OUT, R)])


def test_a_layer_without_a_matrix_is_refused() -> None:
    layer = LoRALinear(nn.ReLU(), {"default": Adapter(IN, OUT, R, 1.0, 0.0, False)})
    with pytest.raises(ModelError, match="LoRA cannot wrap a ReLU"):
        layer(torch.randn(2, IN))
