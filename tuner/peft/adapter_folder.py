"""Adapters on disk in the layout of Hugging Face PEFT, ours or saved by PEFT, put on a model.

`adapter_config.json` is read by `tuner.adapter_config`; `tuner.peft.adapter_writing` writes the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tuner.adapter_config import AdapterConfig, read_adapter_config
from tuner.errors import ModelError
from tuner.peft.adapted import AdaptedLinear, AdapterPart, adapted_layers
from tuner.peft.dora import DoRAAdapter
from tuner.peft.fusion import split, split_vectors, stored_layers
from tuner.peft.ia3 import IA3Linear, Scaling
from tuner.peft.layernorm import Bias, BiasLinear, tune, tuned_norms
from tuner.peft.lora import ADAPTER
from tuner.peft.lora_linear import Adapter, LoRALinear
from tuner.peft.misfits import layer_problems, parameter_problems
from tuner.peft.residual_folder import alpha_over_residual, residual_adapter
from tuner.peft.saved_modules import matched, note, parameters, put, shapes
from tuner.peft.stored import WEIGHTS, Contents, Pair, from_stored, matrix_of, tensors_of
from tuner.peft.stored_rows import load_rows, row_problems, tokens_of
from tuner.peft.token_rows import row_layers
from tuner.types import LinearSlot


def has_adapter(model: nn.Module) -> bool:
    """Whether layers or norms are an adapter's."""
    return next(adapted_layers(model), None) is not None or next(tuned_norms(model), None) is not None


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What PEFT trains of a loaded adapter: parts of layers, norms, and the modules and rows that it brought."""
    for _, layer in adapted_layers(model):
        yield from (p for part in layer.modules() if isinstance(part, AdapterPart) for p in part.parameters())
    for _, parameter in (*tuned_norms(model), *parameters(model)):
        yield parameter
    for _, rows in row_layers(model):
        yield rows.rows


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put an adapter, ours or one saved by PEFT, on the layers its tensors name, its modules and rows in their places.

    A head that is the embedding becomes a matrix of its own where the adapter brings one of the two, as in PEFT.

    Raises:
        ModelError: a file is missing or damaged, or its tensors do not fit the model; all of them are named.
    """
    config = read_adapter_config(folder)
    contents = from_stored(tensors_of(folder), config)
    saved = matched(model, config)
    layers = stored_layers(model, without=saved.paths)
    wanted = shapes(model, saved)
    tokens = tokens_of(model, contents, config)
    problems = [
        *layer_problems(model, contents, layers, config),
        *parameter_problems(contents, wanted, saved),
        *row_problems(model, contents, tokens),
    ]
    if problems:
        raise ModelError(f"{folder / WEIGHTS}: does not fit the model: {', '.join(problems)}")
    put(model, saved, contents.parameters)
    pairs = split(contents.pairs, layers, config.use_rslora)
    slots = {slot.path: slot for layer in layers.values() for slot in layer.parts}
    moved = [path for path, pair in pairs.items() if _move_base(slots[path], pair)]
    alpha = alpha_over_residual(folder)
    for path, pair in pairs.items():
        adapter = None if alpha is None else residual_adapter(model, slots[path], pair, config, alpha)
        _adapt(model, slots[path], adapter or _adapter(pair, config), pair)
    for path, vector in split_vectors(contents.vectors, layers).items():
        scaling = Scaling(vector.flatten())
        _put(model, slots[path], IA3Linear(slots[path].module, scaling, on_input=config.is_feedforward(path)))
    _load_tuned(model, contents, slots)
    load_rows(model, contents, tokens)
    note(model, replace(saved, bases=tuple(moved)))


def rows_wanted(folder: Path) -> int:
    """How many rows embedding and head of the base need for an adapter; 0 where it brings no rows.

    PEFT saves the matrices along where they were resized, and they may have grown beyond the last token.

    Raises:
        ModelError: a file is missing or damaged.
    """
    tokens = [token for ids in read_adapter_config(folder).token_rows.values() for token in ids]
    if not tokens:
        return 0
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as reader:
            matrices = [name for name in reader.keys() if matrix_of(name)]  # noqa: SIM118 (not a dict)
            rows = [int(reader.get_slice(name).get_shape()[0]) for name in matrices]
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS}: {error}") from error
    return max(max(tokens) + 1, *rows, 0)


def _move_base(slot: LinearSlot, pair: Pair) -> bool:
    """Put the frozen weight that was saved along into its layer; whether that was another one."""
    if pair.base is None:
        return False
    weight = cast(nn.Linear, slot.module).weight
    value = pair.base.to(device=weight.device, dtype=weight.dtype)
    if weight.is_meta or torch.equal(weight, value):
        return False
    weight.data.copy_(value)
    return True


def _adapter(pair: Pair, config: AdapterConfig) -> Adapter:
    A, B = cast(Tensor, pair.A), cast(Tensor, pair.B)
    kind = DoRAAdapter if config.use_dora else Adapter
    adapter = kind(A.shape[1], B.shape[0], len(A), pair.alpha, config.dropout, config.use_rslora)
    adapter.A, adapter.B = nn.Parameter(A), nn.Parameter(B)
    return adapter


def _adapt(model: nn.Module, slot: LinearSlot, adapter: Adapter, pair: Pair) -> None:
    layer = LoRALinear(slot.module, {ADAPTER: adapter})
    _put(model, slot, layer)
    layer.begin()
    if isinstance(adapter, DoRAAdapter):
        adapter.magnitude = nn.Parameter(cast(Tensor, pair.magnitude).to(adapter.magnitude.device))


def _put(model: nn.Module, slot: LinearSlot, layer: AdaptedLinear) -> None:
    """Put a layer around the one that is there, on its device and in the mode of the model."""
    slot.replace(layer.to(next(layer.base.parameters()).device).train(model.training))


def _load_tuned(model: nn.Module, contents: Contents, slots: Mapping[str, LinearSlot]) -> None:
    """Weights of norms in their places, biases around their layers."""
    tuned: list[str] = []
    for name, value in contents.tuned.items():
        path, _, parameter = name.rpartition(".")
        if parameter == "bias":
            _put(model, slots[path], BiasLinear(slots[path].module, Bias(value)))
        else:
            device = model.get_parameter(name).device
            model.get_submodule(path).weight = nn.Parameter(value.to(device), requires_grad=False)
            tuned.append(path)
    tune(model, tuple(tuned))
