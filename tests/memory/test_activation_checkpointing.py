"""Activation checkpointing: the same numbers, with each layer computed twice in training and once elsewhere."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from tuner.errors import ModelError
from tuner.memory.default import MemoryTechniques


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x: Tensor, scale: float, *, shift: Tensor) -> Tensor:
        self.calls += 1
        return x + self.dropout(torch.tanh(self.linear(x))) * scale + shift


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.shift = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, 0.5, shift=self.shift)
        return x


def trained(model: Model) -> dict[str, Tensor]:
    """Loss and all gradients of one step, dropout included."""
    torch.manual_seed(1)
    loss = model(torch.randn(4, 8)).square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def model_with(key: bool | Literal["none", "full"]) -> Model:
    model = Model()
    MemoryTechniques(key, False, False, False).apply(model)
    return model


@pytest.mark.parametrize(("key", "calls"), [("full", 2), (True, 2), ("none", 1), (False, 1)])
def test_gradients_are_equal_and_layers_computed_again(key: bool | Literal["none", "full"], calls: int) -> None:
    plain, model = trained(Model()), model_with(key)
    found = trained(model)
    assert plain.keys() == found.keys()
    assert len(plain) == 1 + 7
    for name, value in plain.items():
        assert torch.equal(found[name], value), name  # the same operations in the same order: no tolerance
    assert [layer.calls for layer in model.layers] == [calls] * 3


def test_parameters_keep_their_names() -> None:
    assert model_with("full").state_dict().keys() == Model().state_dict().keys()


def test_no_layer_is_computed_again_in_evaluation() -> None:
    model = model_with("full").eval()
    model(torch.randn(4, 8)).sum().backward()
    assert [layer.calls for layer in model.layers] == [1] * 3


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no list of layers"):
        MemoryTechniques("full", False, False, False).apply(nn.Linear(2, 2))
