"""A model from its parts, in the one order that works: load, quantize, adapt, cast, checkpoint activations.

Each step needs the one before: a quantizer packs loaded weights, an adapter wraps what was packed, and only then is it
known what trains and so what is cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tuner.errors import ConfigError
from tuner.models.config import ModelConfig
from tuner.models.decoder import Decoder
from tuner.models.family import config_of_folder, stated
from tuner.models.folder import load_weights
from tuner.models.linear import Linear
from tuner.models.new_rows import add_rows
from tuner.models.random_weights import fill_with_random_weights
from tuner.optimizers.custom import custom
from tuner.optimizers.groups import Trained
from tuner.peft.adapted import AdapterPart
from tuner.peft.adapter_folder import has_adapter, load_adapter
from tuner.peft.layernorm import tuned_norms
from tuner.peft.token_rows import TokenRows, row_layers
from tuner.precision.cpu_products import multiply_through_fp32
from tuner.quantization.none import NoQuantization
from tuner.types import ChangesWeights, FrozenLinear, OptimizerPlace, Peft, Precision, Quantization, StepsInBackward
from tuner.vocabulary import expected_tokens, rows_brought

UNQUANTIZED = NoQuantization()


class MemoryTechniques(Protocol):
    """A member of the `memory` group."""

    activation_offloading: bool

    offload_optimizer: bool

    def require(self, device: torch.device) -> None: ...

    def apply(self, model: nn.Module) -> None: ...

    def place_of_optimizer(self, parameters: Sequence[nn.Parameter]) -> OptimizerPlace: ...

    def steps_in_backward(
        self, optimizer: torch.optim.Optimizer, clip_each: float | None
    ) -> StepsInBackward | None: ...


def device_of(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means here.

    Raises:
        ConfigError: `cuda` where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: PyTorch finds no CUDA device here; valid here: auto, cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def require_compiler(device: torch.device) -> None:
    """Refuse `train.compile=true` where `torch.compile` would find no C++ compiler after the run has begun.

    Raises:
        ConfigError: naming what was looked for.
    """
    if device.type != "cpu":
        return  # Triton brings its own
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        raise ConfigError(
            "train.compile=true: torch.compile finds no C++ compiler here; install g++, or name one in the environment "
            "variable CXX, or say train.compile=false"
        ) from error


def load_base(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    quantization: Quantization = UNQUANTIZED,
    new_tokens: Sequence[int] = (),
    peft: object = None,
) -> Decoder:
    """The pretrained (or, where asked for, random) model, frozen.

    Args:
        config: as `located` returns it.
        dtype: of the weights.
        device: where they are and which attention kernel is used.
        seed: of random weights.
        quantization: packs each linear layer of the blocks as it arrives, so that the model never exists in full
            precision.
        new_tokens: ids of tokens that get new rows of embedding and head.
        peft: what will be done with the model; some methods change weights before they are quantized.

    Raises:
        ModelError: weights that are missing, damaged or of another shape.
    """
    if device.type == "cpu":
        multiply_through_fp32()  # whatever the weights have: mixed precision and Muon multiply in 16 bits too
    with torch.device("meta"):
        model = config.build()
    slots = {slot.path: slot for slot in model.quantizable()}

    def pack(path: str) -> None:
        if path in slots and isinstance(peft, ChangesWeights):
            peft.before_packing(model, slots[path])
        if path in slots:
            slots[path].replace(quantization.packed(cast(nn.Linear, slots[path].module)))

    if config.path is None:
        fill_with_random_weights(model, dtype, device, seed, pack)
    else:
        load_weights(model, Path(config.path), dtype, device, pack)
    model.tie()
    add_rows(model, new_tokens)
    model.use_kernels("cuda" if device.type == "cuda" else "cpu")
    return model.requires_grad_(False).eval()


def build_model(base: Decoder, peft: Peft, precision: Precision, memory: MemoryTechniques) -> Decoder:
    """Adapt, cast and checkpoint a loaded and quantized model, in place; afterwards it is ready to train."""
    peft.adapt(base)
    cast_trainable(base, precision)
    compute_in(base, precision)
    memory.apply(base)
    return base.train()


def cast_trainable(model: nn.Module, precision: Precision) -> None:
    """Hold the trainable parameters in the dtype that `precision.trainable` says.

    `auto` keeps adapters in fp32, norms that are an adapter's among them, because an update smaller than 1/256 of a
    bf16 number vanishes. Weights of the model itself, those of full training and of modules that an adapter brings
    whole, have the dtype that its weights have.

    Raises:
        ConfigError: such weights would differ from it.
    """
    held: torch.dtype = getattr(torch, precision.held)
    wanted = {"auto": torch.float32, "bf16": torch.bfloat16, "fp32": torch.float32}[precision.trainable]
    adapters = {id(p) for module in model.modules() if isinstance(module, AdapterPart) for p in module.parameters()}
    adapters |= {id(layer.rows) for _, layer in row_layers(model)} | {id(weight) for _, weight in tuned_norms(model)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = [parameter for parameter in trainable if id(parameter) not in adapters]
    if whole and precision.trainable != "auto" and wanted != held:
        what = "an adapter with modules_to_save" if has_adapter(model) else "full weights"
        raise ConfigError(
            f"precision.trainable={precision.trainable} precision={precision.name} {what}: the model computes with the "
            "very weights that train; say precision=fp32 or precision=bf16, and precision.trainable=auto"
        )
    for parameter in trainable:
        parameter.data = parameter.data.to(wanted if id(parameter) in adapters else held)


def compute_in(model: Decoder, precision: Precision) -> None:
    """Let a model whose weights are held in one dtype compute in another, where the precision is mixed."""
    if precision.held == precision.compute:
        return
    dtype: torch.dtype = getattr(torch, precision.compute)
    model.compute_in(dtype)
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            module.compute_in(dtype)
        elif type(module) is nn.Linear:  # put in place of a packed one, because an adapter brings it whole
            module.__class__ = Linear


def trainable_dtype(model: nn.Module) -> str:
    """The dtype of what trains, as `float32`."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    return "+".join(sorted(dtypes))


def build_optimizer(node: DictConfig, params: Sequence[Trained], trusted: Sequence[str]) -> torch.optim.Optimizer:
    """One of our optimizer functions, or a library's class that `optimizer._target_` names."""
    if node._target_.startswith("tuner."):
        return cast(torch.optim.Optimizer, instantiate(node)(params))
    return custom(node._target_, params, keys_of(node), trusted)


def keys_of(node: DictConfig) -> dict[str, Any]:
    """The keys of a group's member as plain containers, without `_target_` and its like."""
    plain = cast(dict[str, Any], OmegaConf.to_container(node))
    return {key: value for key, value in plain.items() if not key.startswith("_")}


def load_model(
    folder: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu", adapter: str | Path | None = None
) -> nn.Module:
    """See `tuner.load_model`."""
    config = config_of_folder(Path(folder).expanduser())
    brought = None if adapter is None else Path(adapter).expanduser()
    new_tokens = () if brought is None else rows_brought(brought, config)
    model = load_base(config, dtype, torch.device(device), seed=0, new_tokens=new_tokens)
    if brought is not None:
        load_adapter(model, brought)
    return model.requires_grad_(False).eval()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters of the model itself and those that train.

    A packed weight counts as the matrix it stands for and an adapter is no part of the model, so the first number is
    the published one whatever the method.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return sum(_own_parameters(module) for module in model.modules()) - _tied_parameters(model), trainable


def _own_parameters(module: nn.Module) -> int:
    if isinstance(module, AdapterPart):
        return 0
    if isinstance(module, FrozenLinear):
        bias = 0 if module.bias is None else module.out_features
        return module.in_features * module.out_features + bias
    twice = module.rows.numel() if isinstance(module, TokenRows) else 0  # they are rows of the matrix too
    return sum(p.numel() for p in module.parameters(recurse=False)) - twice


def _tied_parameters(model: nn.Module) -> int:
    """What the sum over modules counts twice: a matrix that is both embedding and head."""
    return cast(Decoder, model).model.embed_tokens.weight.numel() if cast(Decoder, model).tied else 0


def count_from_config(
    config: ModelConfig, quantization: Quantization, peft: Peft, adapter: Path | None = None
) -> tuple[int, int]:
    """The same from a configuration alone, on the meta device: needs no weights, only a `model.path`'s config.json.

    Raises:
        ModelError: as `stated`.
    """
    config = stated(config)
    new_tokens = rows_brought(adapter, config) if adapter else expected_tokens(config)
    with torch.device("meta"):
        model = config.build()
        quantization.quantize(model)
        add_rows(model, new_tokens)
        peft.adapt(model)
    return count_parameters(model)
