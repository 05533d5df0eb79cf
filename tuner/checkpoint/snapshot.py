"""A run's state as plain values and tensors, taken out of it and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.checkpoint.random_states import random_states, set_random_states
from tuner.errors import CheckpointError
from tuner.types import State

COUNTERS = (
    "step",
    "tokens",
    "seconds",
    "train_loss",
    "skipped_steps",
    "val_loss_before",
    "best_val_loss",
    "best_step",
    "improved_val_loss",
    "improved_step",
    "evaluations_since_improved",
    "before",
)
"""Fields of `State` that are plain values."""

ROW_LIMITS = ("train_rows", "val_rows")
"""Fields of `State` that say how many rows go through the model at once."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that a bitwise-equal resume needs, the frozen base apart.

    Attributes:
        weights: every parameter that trains, by name, on the CPU.
        training: optimizer, position in the data, random generators, scale of the loss, rows at once and counters.
    """

    weights: Mapping[str, Tensor]
    training: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.training["step"])

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors([self.weights, self.training]))


def take(state: State, *, copy: bool) -> Snapshot:
    """The state as it is now.

    Args:
        state: between two steps, so that no gradient is part of it.
        copy: of tensors on the CPU too, so that the run can go on while the snapshot is written.
    """
    training = {
        "optimizer": _on_cpu(state.optimizer.state_dict(), copy),
        "batches": state.batches.state_dict(),
        "rng": random_states(),
        "loss_scale": state.loss_scale.state_dict() if state.loss_scale else None,
        "rows": {name: getattr(state, name).most for name in ROW_LIMITS},
        **{name: getattr(state, name) for name in COUNTERS},
    }
    weights = {name: _on_cpu(tensor, copy).contiguous() for name, tensor in trainable(state.model).items()}
    return Snapshot(weights, training)


def put_back(snapshot: Snapshot, state: State, origin: Path) -> None:
    """Make a newly built state the one that was taken.

    Args:
        snapshot: what was taken.
        state: of the same configuration.
        origin: the checkpoint it was read from, for messages.

    Raises:
        CheckpointError: it was made with other trainable parameters, another optimizer or other data.
    """
    training = snapshot.training
    state.batches.load_state_dict(training["batches"])
    put_weights(snapshot.weights, state.model, origin)
    try:
        load_exactly(state.optimizer, training["optimizer"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{origin}: made with another optimizer: {error}") from error
    for name in COUNTERS:
        setattr(state, name, training[name])
    set_random_states(training["rng"])
    if state.loss_scale is not None and (saved := training["loss_scale"]) is not None:
        state.loss_scale.load_state_dict(saved)
    for name, most in training["rows"].items():
        getattr(state, name).most = most


def load_exactly(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load a state dict, with every tensor of the state in the dtype that was saved.

    `load_state_dict` casts what is floating-point to the dtype of its parameter, which rounds what is kept in fp32 for
    parameters in bf16.

    Raises:
        ValueError, KeyError: it is of another optimizer.
    """
    optimizer.load_state_dict(dict(saved))
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], saved_group["params"], strict=True):
            for name, value in saved["state"].get(number, {}).items():
                loaded = optimizer.state[parameter].get(name)
                if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                    optimizer.state[parameter][name] = value.to(loaded.device, copy=True)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that trains, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def put_weights(weights: Mapping[str, Tensor], model: nn.Module, origin: Path) -> None:
    """Put weights into the parameters that train.

    Raises:
        CheckpointError: they are of other parameters; the model is as it was.
    """
    parameters = trainable(model)
    differing = sorted(parameters.keys() ^ weights.keys())
    differing += [
        f"{name} is {list(weights[name].shape)}, not {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in weights and weights[name].shape != parameter.shape
    ]
    if differing:
        raise CheckpointError(f"{origin}: made with other trainable parameters: {', '.join(differing[:3])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _on_cpu(node: Any, copy: bool) -> Any:
    """The same containers with tensors on the CPU, those that are there already copied where `copy` says so."""
    if isinstance(node, Tensor):
        return node.detach().to("cpu", copy=copy)
    if isinstance(node, dict):
        return {key: _on_cpu(value, copy) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_on_cpu(value, copy) for value in node)
    return node


def _tensors(node: Any) -> list[Tensor]:
    if isinstance(node, Tensor):
        return [node]
    if isinstance(node, Mapping):
        return [tensor for value in node.values() for tensor in _tensors(value)]
    if isinstance(node, list | tuple):
        return [tensor for value in node for tensor in _tensors(value)]
    return []
