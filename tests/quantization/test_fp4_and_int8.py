"""FP4 and 8-bit linear layers against bitsandbytes: the stored bytes and the dense weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tuner.quantization.fp4 import FP4Linear
from tuner.quantization.int8 import Int8Linear
from tuner.quantization.nf4 import NF4Linear
from tuner.quantization.packed_linear import PackedLinear, quantization_error
from tuner.quiet import import_bitsandbytes
from tuner.types import FrozenLinear

# out x in: whole blocks; 1500 scales, no multiple of 256; rows that end inside a block; an odd number of weights; more
# weights than are quantized at once.
SHAPES = [(576, 192), (500, 192), (64, 100), (7, 33), (1100, 1000)]
DTYPES = [torch.float32, torch.bfloat16]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def new_linear(shape: tuple[int, int], dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(shape[1], shape[0]).to(dtype)


def fp4(linear: nn.Linear, double_quant: bool = True) -> FP4Linear:
    return FP4Linear.from_linear(linear, block_size=64, double_quant=double_quant)


@every_shape
@every_dtype
@pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
def test_fp4_is_that_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> None:
    functional, linear = import_bitsandbytes().functional, new_linear(shape, dtype)
    packed, state = functional.quantize_4bit(
        linear.weight.detach(), blocksize=64, compress_statistics=double_quant, quant_type="fp4"
    )
    ours = fp4(linear, double_quant)
    assert torch.equal(ours.weight, packed.flatten())
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.dense_weight(), functional.dequantize_4bit(packed, state))
    assert ours.dense_weight().dtype == dtype
    nf4 = NF4Linear.from_linear(linear, block_size=64, double_quant=double_quant)
    assert not torch.equal(ours.weight, nf4.weight)


@every_shape
@every_dtype
def test_int8_is_that_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Its parameter, quantized as it is moved, and its dequantization."""
    bitsandbytes, linear = import_bitsandbytes(), new_linear(shape, dtype)
    theirs = bitsandbytes.nn.Int8Params(linear.weight.detach().clone(), requires_grad=False).to("cpu")
    ours = Int8Linear.from_linear(linear)
    assert ours.weight.dtype == torch.int8
    assert torch.equal(ours.weight, theirs.CB.flatten())
    assert torch.equal(ours.scale, theirs.SCB)
    dense = bitsandbytes.functional.int8_vectorwise_dequant(theirs.CB, theirs.SCB)
    assert torch.equal(ours.dense_weight(), dense.to(dtype))
    assert quantization_error(linear.weight, ours)["relative_error"] < 0.01


def test_a_row_of_zeros_stays_one() -> None:
    linear = new_linear((7, 33), torch.float32)
    nn.init.zeros_(linear.weight[3])
    assert torch.equal(Int8Linear.from_linear(linear).dense_weight()[3], torch.zeros(33))
    assert torch.equal(fp4(linear).dense_weight()[3], torch.zeros(33))


KINDS = {"fp4": fp4, "int8": Int8Linear.from_linear}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@kinds
@every_dtype
def test_forward_and_backward_are_those_of_a_dense_layer(kind: type[PackedLinear], dtype: torch.dtype) -> None:
    """Bit for bit: the same kernels on the same numbers."""
    linear = new_linear((500, 192), dtype)
    layer = kind(linear)  # type: ignore[arg-type]
    inputs = [torch.randn(2, 5, 192, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2)]
    ours, theirs = (x.requires_grad_() for x in inputs)
    y, expected = layer(ours), F.linear(theirs, layer.dense_weight(), linear.bias)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    assert isinstance(layer, FrozenLinear)
    assert all(part.dim() == 1 and not part.requires_grad and part.grad is None for part in layer.parameters())


@kinds
def test_casting_changes_the_compute_dtype_and_no_level(kind: type[PackedLinear]) -> None:
    layer = kind(new_linear((500, 192), torch.float32))  # type: ignore[arg-type]
    before: dict[str, Tensor] = {name: part.clone() for name, part in layer.state_dict().items()}
    exact = layer.dense_weight()
    nn.Sequential(layer).to(torch.bfloat16)
    assert torch.equal(layer.dense_weight(), exact.bfloat16())
    assert all(torch.equal(layer.state_dict()[name], part) for name, part in before.items() if name != "bias")
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16


@kinds
@every_dtype
def test_round_trip_through_safetensors_and_the_meta_device(
    kind: type[PackedLinear], dtype: torch.dtype, tmp_path: Path
) -> None:
    layer = kind(new_linear((500, 192), dtype))  # type: ignore[arg-type]
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    empty = kind(new_linear((500, 192), dtype).to("meta"))  # type: ignore[arg-type]
    described = {name: (part.shape, part.dtype) for name, part in empty.named_parameters()}
    assert described == {name: (part.shape, part.dtype) for name, part in layer.named_parameters()}
    loaded = empty.to_empty(device="cpu")
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(loaded.dense_weight(), layer.dense_weight())


@kinds
def test_compiles_without_a_graph_break(kind: type[PackedLinear]) -> None:
    layer = kind(new_linear((500, 192), torch.float32))  # type: ignore[arg-type]
    x = torch.randn(4, 192, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
