"""What a model's parameters are called in a Hugging Face folder, and which of its matrices are several layers here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tuner.models.config import ModelConfig
from tuner.models.decoder import Decoder


def stored_parts(model: Decoder) -> dict[str, tuple[str, ...]]:
    """Name of each stored tensor -> names of the parameters in it, stacked by rows; a tied head is not stored."""
    fusions = {part: stored for stored, parts in model.config.fused.items() for part in parts}
    parts: dict[str, tuple[str, ...]] = {}
    for name, _ in model.named_parameters():
        stored = stored_name(name, fusions)
        parts[stored] = (*parts.get(stored, ()), name)
    return parts


def stored_name(name: str, fusions: Mapping[str, str]) -> str:
    """`model.layers.0.self_attn.k_proj.weight` -> `model.layers.0.self_attn.qkv_proj.weight` where those are fused."""
    path, _, kind = name.rpartition(".")
    for part, stored in fusions.items():
        if path.endswith(f".{part}"):
            return f"{path.removesuffix(part)}{stored}.{kind}"
    return name


def stored_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """Shape of each stored tensor."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {
        stored: (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
        for stored, parts in stored_parts(model).items()
    }


def stored_tensors(model: Decoder) -> dict[str, tuple[Part, ...]]:
    """The tensors that each stored one is stacked of, which is done as it is written."""
    parameters = dict(model.named_parameters())
    return {stored: tuple(parameters[part].detach() for part in parts) for stored, parts in stored_parts(model).items()}


@dataclass(frozen=True)
class Unmade:
    """A tensor that is made when it is written, as a weight with its adapter merged in."""

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]


Part = Tensor | Unmade
"""What a stored tensor is stacked of."""


def stacked(parts: tuple[Part, ...]) -> Tensor:
    """One stored tensor on the CPU."""
    made = [part.make() if isinstance(part, Unmade) else part for part in parts]
    return (made[0] if len(made) == 1 else torch.cat(made)).cpu().contiguous()


def stacked_shape(parts: tuple[Part, ...]) -> tuple[int, ...]:
    """The shape of that."""
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def replace_parameter(model: nn.Module, name: str, value: Tensor) -> nn.Module:
    """Put a frozen parameter in the place of one; returns the module that holds it."""
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, kind, nn.Parameter(value, requires_grad=False))
    return module


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that a folder of this configuration holds."""
    with torch.device("meta"):
        return stored_shapes(config.build())
