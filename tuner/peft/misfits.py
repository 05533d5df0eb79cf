"""What of an adapter folder does not fit a model, each thing by its name, before anything is put on the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from tuner.adapter_config import IA3, LN_TUNING, AdapterConfig
from tuner.peft.fusion import StoredLayer
from tuner.peft.layernorm import norms
from tuner.peft.saved_modules import EMBEDDING, HEAD, SavedModules
from tuner.peft.stored import Contents, Pair

LEFT_OUT = "which adapter_config.json leaves out (target_modules, layers_to_transform)"


def layer_problems(
    model: nn.Module, contents: Contents, layers: Mapping[str, StoredLayer], config: AdapterConfig
) -> Iterator[str]:
    """What is wrong with that which belongs to layers.

    Args:
        model: without an adapter.
        contents: of the folder.
        layers: those of the checkpoint that it may adapt.
        config: its settings.
    """
    if config.kind == IA3:
        yield from _vector_problems(contents, layers, config)
    elif config.kind == LN_TUNING:
        yield from _tuned_problems(model, contents, layers, config)
    else:
        yield from _pair_problems(contents, layers, config)


def _vector_problems(contents: Contents, layers: Mapping[str, StoredLayer], config: AdapterConfig) -> Iterator[str]:
    """What is wrong with the vectors of (IA)³."""
    if not contents.vectors:
        yield "no layer has an adapter in it"
    for path, vector in contents.vectors.items():
        if path not in layers:
            yield f"{path} is no linear layer of it"
            continue
        rows, columns = layers[path].shape
        wanted = (1, columns) if config.is_feedforward(path) else (rows, 1)
        if not config.is_target(path):
            yield f"{path} has an adapter, {LEFT_OUT}"
        elif vector.shape != wanted:
            yield f"{path}.ia3_l is {list(vector.shape)} and should be {list(wanted)}"
        elif config.is_feedforward(path) and len(layers[path].parts) > 1:
            yield f"{path} is several layers here, whose input cannot be scaled as one"


def _tuned_problems(
    model: nn.Module, contents: Contents, layers: Mapping[str, StoredLayer], config: AdapterConfig
) -> Iterator[str]:
    """What is wrong with weights of norms and biases."""
    if not contents.tuned:
        yield "no layer has an adapter in it"
    wanted = {f"{path}.weight": (len(norm.weight),) for path, norm in norms(model)}  # type: ignore[arg-type]
    for path, layer in layers.items():
        if len(layer.parts) == 1 and layer.parts[0].module.bias is not None:
            wanted[f"{path}.bias"] = (layer.shape[0],)
    for name, value in contents.tuned.items():
        if name not in wanted:
            yield f"{name} is neither of a norm nor the bias of a linear layer"
        elif not config.is_target(name.rpartition(".")[0]):
            yield f"{name} was tuned, {LEFT_OUT}"
        elif value.shape != wanted[name]:
            yield f"{name} is {list(value.shape)} and should be {list(wanted[name])}"


def _pair_problems(contents: Contents, layers: Mapping[str, StoredLayer], config: AdapterConfig) -> Iterator[str]:
    """What is wrong with the matrices of layers."""
    if not contents.pairs:
        yield "no layer has an adapter in it"
    for path, pair in contents.pairs.items():
        if path not in layers:
            yield f"{path} is no linear layer of it"
        elif not config.is_target(path):
            yield f"{path} has an adapter, {LEFT_OUT}"
        elif pair.A is None or pair.B is None:
            yield f"{path} has one of lora_A and lora_B only"
        elif (pair.magnitude is not None) is not config.use_dora:
            there = "is missing, which use_dora wants" if config.use_dora else "is there, and use_dora is not set"
            yield f"{path}.lora_magnitude_vector {there}"
        else:
            yield from _shape_problems(path, pair.A, pair.B, pair, layers[path])


def _shape_problems(path: str, A: Tensor, B: Tensor, pair: Pair, layer: StoredLayer) -> Iterator[str]:
    shape, rank, base = layer.shape, pair.rank, pair.base
    if pair.magnitude is not None and pair.magnitude.shape != (shape[0],):
        yield f"{path}.lora_magnitude_vector is {list(pair.magnitude.shape)} and should be [{shape[0]}]"
    if A.shape[1:] != (shape[1],) or B.shape != (shape[0], len(A)):
        yield f"{path} is made for another size than {list(shape)}"
    elif len(A) != rank:
        yield f"{path} has rank {len(A)} where adapter_config.json says {rank}"
    replaceable = len(layer.parts) == 1 and isinstance(layer.parts[0].module, nn.Linear)
    if base is not None and (base.shape != shape or not replaceable):
        yield f"{path}.base_layer is {list(base.shape)}, no weight of {list(shape)} that can be replaced"


def parameter_problems(contents: Contents, wanted: Mapping[str, tuple[int, ...]], saved: SavedModules) -> Iterator[str]:
    """What is wrong with the weights of modules that are saved whole."""
    given = contents.parameters
    yield from (f"{name} is of no module it could replace" for name in given if name not in wanted)
    yield from (f"{name} is missing, which modules_to_save names" for name in wanted if name not in given)
    for name, shape in wanted.items():
        if name in given and given[name].shape != shape:
            yield f"{name} is {list(given[name].shape)} and should be {list(shape)}"
    ends = [given.get(f"{path}.weight") for path in (EMBEDDING, HEAD)]
    if saved.tied and ends[0] is not None and ends[1] is not None and not torch.equal(ends[0], ends[1]):
        yield f"{HEAD} and {EMBEDDING} differ, which ensure_weight_tying makes one"
