"""NF4 linear layers against bitsandbytes: the stored bytes and the dense weights, bit for bit."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tuner.errors import ConfigError, ModelError
from tuner.quantization.nf4 import NF4, NF4Linear
from tuner.quantization.packed_linear import quantization_error
from tuner.quiet import import_bitsandbytes
from tuner.types import FrozenLinear, LinearSlot

# out x in: whole blocks; 1500 scales, no multiple of 256; rows that end inside a block; an odd number of weights.
SHAPES = [(576, 192), (500, 192), (64, 100), (7, 33)]
DTYPES = [torch.float32, torch.bfloat16]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
single_and_double = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])


def new_linear(shape: tuple[int, int], dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(shape[1], shape[0], bias=bias).to(dtype)


def quantized(linear: nn.Linear, double_quant: bool = True, block_size: int = 64) -> NF4Linear:
    return NF4Linear.from_linear(linear, block_size=block_size, double_quant=double_quant)


def reference(linear: nn.Linear, double_quant: bool = True, block_size: int = 64) -> tuple[Tensor, Any]:
    functional = import_bitsandbytes().functional
    return functional.quantize_4bit(
        linear.weight.detach(), blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )


@every_shape
@every_dtype
@single_and_double
class TestAgainstBitsandbytes:
    def test_bytes(self, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> None:
        linear = new_linear(shape, dtype)
        ours, (packed, state) = quantized(linear, double_quant), reference(linear, double_quant)
        assert torch.equal(ours.weight, packed.flatten())
        assert torch.equal(ours.absmax, state.absmax)
        assert ours.absmax.dtype == (torch.uint8 if double_quant else torch.float32)
        if double_quant:
            assert torch.equal(ours.absmax_scale, state.state2.absmax)
            assert torch.equal(ours.absmax_offset, state.offset.reshape(1))
            assert state.state2.blocksize == 256
        else:
            assert ours.absmax_scale is None
            assert ours.absmax_offset is None

    def test_dense_weight(self, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> None:
        linear = new_linear(shape, dtype)
        expected = import_bitsandbytes().functional.dequantize_4bit(*reference(linear, double_quant))
        weight = quantized(linear, double_quant).dense_weight()
        assert weight.dtype == dtype
        assert weight.shape == shape
        assert torch.equal(weight, expected)

    def test_every_part_is_flat_and_frozen(
        self, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool
    ) -> None:
        layer = quantized(new_linear(shape, dtype), double_quant)
        names = ["weight", "absmax", *(["absmax_scale", "absmax_offset"] if double_quant else []), "bias"]
        assert [name for name, _ in layer.named_parameters()] == names
        assert all(part.dim() == 1 and not part.requires_grad for part in layer.parameters())
        assert not list(layer.buffers())

    def test_empty_has_the_shapes_of_a_quantized_layer(
        self, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool
    ) -> None:
        real = quantized(new_linear(shape, dtype), double_quant)
        empty = NF4Linear.empty(
            shape[1],
            shape[0],
            bias=True,
            block_size=64,
            double_quant=double_quant,
            compute_dtype=dtype,
            device="meta",
        )
        of_meta = quantized(new_linear(shape, dtype).to("meta"), double_quant)
        for layer in (empty, of_meta):
            assert {part.device.type for part in layer.parameters()} == {"meta"}
            described = {name: (part.shape, part.dtype) for name, part in layer.named_parameters()}
            assert described == {name: (part.shape, part.dtype) for name, part in real.named_parameters()}

    def test_round_trip_through_safetensors_and_the_meta_device(
        self, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool, tmp_path: Path
    ) -> None:
        layer = quantized(new_linear(shape, dtype), double_quant)
        save_file(layer.state_dict(), tmp_path / "layer.safetensors")
        loaded = quantized(new_linear(shape, dtype).to("meta"), double_quant).to_empty(device="cpu")
        loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"))
        assert torch.equal(loaded.dense_weight(), layer.dense_weight())
        assert torch.equal(loaded.bias, layer.bias)


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_size_equals_bitsandbytes(block_size: int) -> None:
    linear = new_linear((500, 192), torch.float32)
    layer = quantized(linear, block_size=block_size)
    packed, state = reference(linear, block_size=block_size)
    assert torch.equal(layer.weight, packed.flatten())
    assert torch.equal(layer.dense_weight(), import_bitsandbytes().functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("block_size", [1, 63, 100, 8192])
def test_a_block_size_without_a_kernel_is_refused(block_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"quantization\.block_size={block_size}: .*valid: 32, 64, 128"):
        NF4(block_size, double_quant=True)


@pytest.mark.parametrize(("double_quant", "bits"), [(False, 4.5), (True, 4 + 8 / 64 + 32 / (64 * 256))])
def test_bits_a_weight(double_quant: bool, bits: float) -> None:
    layer = quantized(new_linear((1024, 1024), torch.float32, bias=False), double_quant)
    stored = sum(part.numel() * part.element_size() for name, part in layer.named_parameters())
    offset = 4 if double_quant else 0
    assert 8 * (stored - offset) / 1024**2 == bits


@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_forward_and_backward_are_those_of_a_dense_layer(dtype: torch.dtype, bias: bool) -> None:
    """Bit for bit: the same kernels on the same numbers."""
    linear = new_linear((500, 192), dtype, bias)
    layer = quantized(linear)
    weight = layer.dense_weight()
    inputs = [torch.randn(2, 5, 192, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2)]
    ours, theirs = (x.requires_grad_() for x in inputs)
    y, expected = layer(ours), F.linear(theirs, weight, linear.bias)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_gradient_by_finite_differences() -> None:
    """`y = x W^T` is linear, so a central difference is exact but for fp32 rounding (1e-3 of values around 1)."""
    layer = quantized(new_linear((30, 64), torch.float32))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    direction = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    probe = torch.randn(3, 30, generator=torch.Generator().manual_seed(3))
    (layer(x) * probe).sum().backward()
    with torch.no_grad():
        difference = ((layer(x + direction) - layer(x - direction)) * probe).sum() / 2
    torch.testing.assert_close((x.grad * direction).sum(), difference, rtol=1e-3, atol=1e-3)


def test_no_dense_weight_lives_between_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quantized(new_linear((500, 192), torch.float32))
    made: list[weakref.ref[Tensor]] = []
    original = NF4Linear.dense_weight

    def watched(self: NF4Linear) -> Tensor:
        weight = original(self)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(NF4Linear, "dense_weight", watched)
    x = torch.randn(4, 192, requires_grad=True)
    y = layer(layer(x)[:, :192])
    gc.collect()
    assert [weight() for weight in made] == [None, None]
    y.sum().backward()
    assert len(made) == 4
    assert x.grad is not None


def test_no_graph_where_nothing_trains() -> None:
    assert not quantized(new_linear((500, 192), torch.float32))(torch.randn(4, 192)).requires_grad


@single_and_double
def test_casting_changes_the_compute_dtype_and_no_level(double_quant: bool) -> None:
    layer = quantized(new_linear((500, 192), torch.float32), double_quant)
    before = {name: part.clone() for name, part in layer.state_dict().items()}
    exact = layer.dense_weight()
    model = nn.Sequential(layer).to(torch.bfloat16)
    assert layer.compute_dtype == torch.bfloat16
    for name, part in layer.state_dict().items():
        assert torch.equal(part, before[name].bfloat16() if name == "bias" else before[name]), name
        assert name == "bias" or part.dtype == before[name].dtype
    assert torch.equal(layer.dense_weight(), exact.bfloat16())
    assert model(torch.randn(2, 192).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(model.float()[0].dense_weight(), exact)
    assert not any(part.requires_grad for part in layer.parameters())


def test_is_a_frozen_linear() -> None:
    assert isinstance(quantized(new_linear((500, 192), torch.float32)), FrozenLinear)


@single_and_double
def test_compiles_without_a_graph_break(double_quant: bool) -> None:
    layer = quantized(new_linear((500, 192), torch.float32), double_quant)
    inputs = [torch.randn(4, 192, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in range(2)]
    compiled, eager = torch.compile(layer, backend="eager", fullgraph=True)(inputs[0]), layer(inputs[1])
    assert torch.equal(compiled, eager)
    compiled.sum().backward()
    eager.sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


@every_dtype
def test_quantization_error_is_that_of_the_dense_weights(dtype: torch.dtype) -> None:
    linear = new_linear((500, 192), dtype)
    dense = linear.weight.detach().double()
    layer = quantized(linear)
    difference = layer.dense_weight().double() - dense
    error = quantization_error(linear.weight, layer)
    assert error["relative_error"] == pytest.approx(float(difference.norm() / dense.norm()), rel=1e-5)
    assert error["max_abs_error"] == pytest.approx(float(difference.abs().max()), rel=1e-6)
    assert 0.08 < error["relative_error"] < 0.1


def test_a_matrix_of_levels_has_no_error() -> None:
    """Weights that are levels times a power of two come back exactly, in fp32 and without double quantization."""
    levels = import_bitsandbytes().functional.get_4bit_type("nf4", device="cpu")
    linear = nn.Linear(64, 8, bias=False)
    linear.weight.data = levels.repeat(8, 4) * 2.0 ** torch.arange(8).unsqueeze(1)
    assert quantization_error(linear.weight, quantized(linear, double_quant=False)) == {
        "relative_error": 0.0,
        "max_abs_error": 0.0,
    }


def test_a_model_with_nothing_to_quantize_is_refused() -> None:
    class Bare(nn.Module):
        def quantizable(self) -> Any:
            return iter(())

    with pytest.raises(ModelError, match="quantization=nf4: Bare has no linear layer to quantize"):
        NF4(64, double_quant=True).quantize(Bare())


@pytest.mark.slow
def test_quantizing_holds_one_dense_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([new_linear((64, 64), torch.float32) for _ in range(4)])

        def quantizable(self) -> Any:
            for name, _ in self.layers.named_children():
                yield LinearSlot("mlp", self.layers, name, f"layers.{name}")

    model = Stack()
    weights = [weakref.ref(layer.weight) for layer in model.layers]
    alive: list[int] = []
    original = NF4Linear.from_linear.__func__  # type: ignore[attr-defined]

    def counting(cls: Any, linear: nn.Linear, **keys: Any) -> NF4Linear:
        gc.collect()
        alive.append(sum(weight() is not None for weight in weights))
        return original(cls, linear, **keys)

    monkeypatch.setattr(NF4Linear, "from_linear", classmethod(counting))
    NF4(64, double_quant=True).quantize(model)
    # While one layer is quantized, the loop's variable may still hold the layer before it.
    assert all(count <= expected for count, expected in zip(alive, [4, 4, 3, 2], strict=True)), alive
    assert all(isinstance(layer, NF4Linear) for layer in model.layers)
