"""Every member of the quantization group: error bound, gradients, frozen weights, bytes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from tuner.types import LinearSlot

CONF = Path(__file__).parents[2] / "conf" / "quantization"
MEMBERS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}

# Bits a weight and relative Frobenius error on normally distributed weights that each member keeps to.
BITS = {"none": 32.0, "nf4": 4.13, "fp4": 4.13, "int8": 8.12}
ERROR = {"none": 0.0, "nf4": 0.095, "fp4": 0.125, "int8": 0.009}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(192, 500, bias=False)
        self.down = nn.Linear(500, 192)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Toy(nn.Module):
    """Embedding, two blocks, output head; says as the models do what may be quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 192)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(192, 50, bias=False)

    def quantizable(self) -> Iterator[LinearSlot]:
        for index, block in enumerate(self.blocks):
            yield LinearSlot("mlp", block, "up", f"blocks.{index}.up")
            yield LinearSlot("mlp", block, "down", f"blocks.{index}.down")

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def build(name: str) -> Any:
    keys = {key: value for key, value in MEMBERS[name].items() if not key.startswith("_")}
    module, _, attribute = MEMBERS[name]["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), attribute)(**keys)


def new_model(dtype: torch.dtype = torch.float32) -> Toy:
    torch.manual_seed(0)
    return Toy().to(dtype).requires_grad_(False)


def dense(linear: Any) -> Tensor:
    return linear.weight if isinstance(linear, nn.Linear) else linear.dense_weight()


def linears(model: Toy) -> list[Any]:
    return [linear for block in model.blocks for linear in (block.up, block.down)]


def test_all_members_are_found_and_have_a_bound() -> None:
    assert set(MEMBERS) == set(BITS) == set(ERROR)


@pytest.mark.parametrize("name", MEMBERS)
class TestEveryMember:
    def test_the_yaml_lists_exactly_the_signature(self, name: str) -> None:
        member = build(name)
        keys = [key for key in MEMBERS[name] if not key.startswith("_")]
        has_init = type(member).__init__ is not object.__init__
        assert keys == (list(inspect.signature(type(member)).parameters) if has_init else [])
        assert member.name == name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_error_bound(self, name: str, dtype: torch.dtype) -> None:
        model, exact = new_model(dtype), new_model(dtype)
        for linear, original in zip(linears(model), linears(exact), strict=True):
            for weight in (linear.weight, original.weight):
                weight.data.normal_(generator=torch.Generator().manual_seed(1))
        build(name).quantize(model)
        for linear, original in zip(linears(model), linears(exact), strict=True):
            weight = dense(linear)
            assert weight.shape == original.weight.shape
            assert weight.dtype == dtype
            difference = (weight.float() - original.weight.float()).norm() / original.weight.float().norm()
            assert difference <= ERROR[name]

    def test_bytes_as_claimed(self, name: str) -> None:
        model = new_model()
        build(name).quantize(model)
        stored = sum(
            parameter.numel() * parameter.element_size()
            for linear in linears(model)
            for key, parameter in linear.named_parameters()
            if key != "bias"
        )
        assert 8 * stored / (4 * 192 * 500) <= BITS[name]

    def test_embedding_head_and_biases_stay(self, name: str) -> None:
        model, exact = new_model(), new_model()
        build(name).quantize(model)
        assert torch.equal(model.embedding.weight, exact.embedding.weight)
        assert torch.equal(model.lm_head.weight, exact.lm_head.weight)
        for block, original in zip(model.blocks, exact.blocks, strict=True):
            assert torch.equal(block.down.bias, original.down.bias)
            assert block.up.bias is None

    def test_gradient_goes_through_and_none_stays(self, name: str) -> None:
        """A trainable tensor before the blocks gets the gradient of the same model with dense weights."""
        model = new_model()
        build(name).quantize(model)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        same = new_model()
        for linear, original in zip(linears(model), linears(same), strict=True):
            original.weight.data = dense(linear).clone()
        grads = []
        for each in (model, same):
            shift = torch.zeros(192, requires_grad=True)
            each.embedding.register_forward_hook(lambda *args, shift=shift: args[-1] + shift)
            each(torch.arange(12).reshape(3, 4)).square().mean().backward()
            assert all(parameter.grad is None for parameter in each.parameters())
            grads.append(shift.grad)
        assert grads[0] is not None
        assert grads[0].abs().max() > 0
        # fp32, the same products: only the shapes given to the matrix multiplication may differ.
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)

    def test_state_dict_round_trip_is_bitwise(self, name: str) -> None:
        model = new_model()
        build(name).quantize(model)
        torch.manual_seed(1)
        other = Toy()
        build(name).quantize(other)
        other.load_state_dict(model.state_dict())
        tokens = torch.arange(12).reshape(3, 4)
        assert torch.equal(model(tokens), other(tokens))
