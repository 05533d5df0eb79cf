"""A model from its parts, in the one order that works: load, quantize, adapt, cast, checkpoint activations.

Each step needs the one before: a quantizer packs loaded weights, an adapter wraps what was packed, and only then is it
known what trains and so what is cast.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import nn

from tuner.errors import ConfigError, ModelError
from tuner.models.family import config_of_folder
from tuner.models.folder import load_weights
from tuner.models.llama import Llama, LlamaConfig
from tuner.models.package import cached
from tuner.models.random_weights import fill_with_random_weights
from tuner.peft.adapter_folder import load_adapter
from tuner.peft.lora_linear import Adapter
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.tiny import write_tiny_tokenizer
from tuner.types import FrozenLinear, Peft, Precision, Quantization, Tokenizer


class MemoryTechniques(Protocol):
    """A member of the `memory` group."""

    def apply(self, model: nn.Module) -> None: ...


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


def load_base(config: LlamaConfig, dtype: torch.dtype, device: torch.device, seed: int) -> Llama:
    """The pretrained (or, where asked for, random) model, frozen.

    Args:
        config: as `located` returns it.
        dtype: of the weights.
        device: where they are and which attention kernel is used.
        seed: of random weights.

    Raises:
        ModelError: weights that are missing, damaged or of another shape.
    """
    with torch.device("meta"):
        model = config.build()
    if config.path is None:
        fill_with_random_weights(model, dtype, device, seed)
    else:
        load_weights(model, Path(config.path), dtype, device)
    model.tie()
    model.use_attention(device.type)
    return model.requires_grad_(False).eval()


def build_model(
    base: Llama, quantization: Quantization, peft: Peft, precision: Precision, memory: MemoryTechniques
) -> Llama:
    """Quantize, adapt, cast and checkpoint a loaded model, in place; afterwards it is ready to train."""
    quantization.quantize(base)
    peft.adapt(base)
    cast_trainable(base, precision)
    memory.apply(base)
    return base.train()


def cast_trainable(model: nn.Module, precision: Precision) -> None:
    """Hold the trainable parameters in the dtype that `precision.trainable` says.

    `auto` keeps adapters in fp32, because an update smaller than 1/256 of a bf16 number vanishes, and leaves the
    weights of full training as they are.

    Raises:
        ConfigError: full training whose weights would differ from the dtype computed in.
    """
    compute: torch.dtype = getattr(torch, precision.compute)
    adapters = any(not parameter.requires_grad for parameter in model.parameters())
    wanted = {"auto": torch.float32 if adapters else compute, "bf16": torch.bfloat16, "fp32": torch.float32}
    dtype = wanted[precision.trainable]
    if not adapters and dtype != compute:
        raise ConfigError(
            f"precision.trainable={precision.trainable} precision={precision.name} peft=full: full training computes "
            "with the very weights it trains; say precision=fp32 or precision=bf16, and precision.trainable=auto"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def trainable_dtype(model: nn.Module) -> str:
    """The dtype of what trains, as `float32`."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    return "+".join(sorted(dtypes))


def tokenizer_of(config: LlamaConfig) -> Tokenizer:
    """The tokenizer of a located model; random weights have the small packaged one."""
    if config.path is not None:
        return load_tokenizer(config.path)
    return load_tokenizer(cached("tiny-tokenizer", write_tiny_tokenizer))


def require_embedded(ids: Iterable[int], config: LlamaConfig) -> None:
    """Refuse tokens that the model has no embedding of, as those of another model's tokenizer.

    Raises:
        ModelError: naming the largest.
    """
    if (largest := max(ids)) >= config.vocab_size:
        raise ModelError(
            f"model.path={config.path}: its tokenizer makes token {largest} and its embedding has {config.vocab_size} "
            "rows (vocab_size); is the tokenizer that of another model?"
        )


def load_model(
    folder: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu", adapter: str | Path | None = None
) -> nn.Module:
    """See `tuner.load_model`."""
    model = load_base(config_of_folder(Path(folder).expanduser()), dtype, torch.device(device), seed=0)
    if adapter is not None:
        load_adapter(model, Path(adapter).expanduser())
    return model.requires_grad_(False).eval()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters of the model itself and those that train.

    A packed weight counts as the matrix it stands for and an adapter is no part of the model, so the first number is
    the published one whatever the method.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return sum(_own_parameters(module) for module in model.modules()) - _tied_parameters(model), trainable


def _own_parameters(module: nn.Module) -> int:
    if isinstance(module, Adapter):
        return 0
    if isinstance(module, FrozenLinear):
        bias = 0 if module.bias is None else module.out_features
        return module.in_features * module.out_features + bias
    return sum(p.numel() for p in module.parameters(recurse=False))


def _tied_parameters(model: nn.Module) -> int:
    """What the sum over modules counts twice: a matrix that is both embedding and head."""
    return cast(Llama, model).lm_head.weight.numel() if cast(Llama, model).tied else 0


def count_from_config(config: LlamaConfig, quantization: Quantization, peft: Peft) -> tuple[int, int]:
    """The same from a configuration alone, on the meta device: needs no weights, only a `model.path`'s config.json."""
    if config.path is not None:
        config = config_of_folder(Path(config.path))
    with torch.device("meta"):
        model = config.build()
        quantization.quantize(model)
        peft.adapt(model)
    return count_parameters(model)
