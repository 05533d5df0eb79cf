"""Modules that an adapter brings whole (`modules_to_save` of PEFT): their weights take the place of the base's.

They stay the plain modules they are, under their names, so training, checkpoints, merging and the fused loss need no
special case; the model only notes which they are. Embedding and head of a tied model become two matrices where PEFT
makes two of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from tuner.adapter_config import AdapterConfig
from tuner.types import CausalLM, FrozenLinear

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
NOTE = "saved_modules"
"""The attribute of a model that holds its `SavedModules`."""


@dataclass(frozen=True)
class SavedModules:
    """Which modules of a model an adapter brought.

    Attributes:
        names: as `adapter_config.json` lists them: ends of names.
        paths: full names of the modules with parameters that these are.
        tied: embedding and head are among them and stay one matrix.
        bases: full names of adapted layers whose frozen weight is another than that of the base.
    """

    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    tied: bool = False
    bases: tuple[str, ...] = ()


def saved_modules(model: nn.Module) -> SavedModules:
    """What is noted on `model`; without an adapter that brought modules, none."""
    noted: SavedModules = getattr(model, NOTE, SavedModules())
    return noted


def note(model: nn.Module, saved: SavedModules) -> None:
    setattr(model, NOTE, saved)


def matched(model: nn.Module, config: AdapterConfig) -> SavedModules:
    """The modules of a model without adapters that `config` names."""
    own = [path for path, module in model.named_modules() if _parameter_shapes(module)]
    paths = tuple(path for path in own if config.is_saved(path))
    both = {EMBEDDING, HEAD}
    tied = cast(CausalLM, model).tied and config.ensure_weight_tying and not both.isdisjoint(paths)
    if tied:
        paths = tuple(path for path in own if path in both or path in paths)
    return SavedModules(config.modules_to_save, paths, tied)


def shapes(model: nn.Module, saved: SavedModules) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that belongs to `saved`, packed ones as what they stand for."""
    parts = {path: _parameter_shapes(model.get_submodule(path)) for path in saved.paths}
    return {f"{path}.{name}": shape for path, found in parts.items() for name, shape in found.items()}


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that was brought; a tied matrix under both of its names."""
    for path in saved_modules(model).paths:
        for name, parameter in model.get_submodule(path).named_parameters(recurse=False):
            yield f"{path}.{name}", parameter


def put(model: nn.Module, saved: SavedModules, weights: Mapping[str, Tensor]) -> None:
    """Replace the weights of `saved`; a packed layer becomes a plain one in the dtype that the model computes in."""
    lm = cast(CausalLM, model)
    dtype = cast(nn.Linear, lm.lm_head).weight.dtype
    for path in saved.paths:
        device = next(model.get_submodule(path).parameters()).device
        module = _plain(model, path)
        for name in _parameter_shapes(module):
            value = weights[f"{path}.{name}"].to(device=device, dtype=dtype, copy=True)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    if saved.tied:
        cast(Any, model).tie()
    elif lm.tied and not {EMBEDDING, HEAD}.isdisjoint(saved.paths):
        untie(model)
    note(model, saved)


def untie(model: nn.Module) -> None:
    """From here on embedding and head are two matrices, whatever they were."""
    lm = cast(Any, model)
    lm.tied = False
    lm.config = replace(lm.config, tie_word_embeddings=False)


def _parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's own parameters, of a packed layer those of the plain one."""
    if isinstance(module, FrozenLinear):
        bias = {} if module.bias is None else {"bias": (module.out_features,)}
        return {"weight": (module.out_features, module.in_features), **bias}
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}


def _plain(model: nn.Module, path: str) -> nn.Module:
    """The module of this name; a packed layer is replaced by an empty plain one first."""
    module = model.get_submodule(path)
    if not isinstance(module, FrozenLinear):
        return module
    parent, _, name = path.rpartition(".")
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    setattr(model.get_submodule(parent), name, linear.train(cast(nn.Module, module).training))
    return linear
