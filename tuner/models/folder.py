"""Weights in a Hugging Face folder: `config.json` and safetensors, one file or many with an index."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tuner.errors import CheckpointError, ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NAMED_PROBLEMS = 6
"""Tensors that do not fit are named up to this many: a model of another size would name every one it has."""

NOT_WEIGHTS = "rotary_emb.inv_freq"
"""End of the names of buffers that older exports of Llama 2 hold, and that follow from the configuration."""

MAX_SHARD_BYTES = 5_000_000_000
"""transformers' own default is 5 GB a file up to version 4."""


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder.

    Raises:
        ModelError: no such folder or file, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json, so this is no Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, each of which exists and is whole.

    Raises:
        ModelError: none, one that the index names is missing, or one that is truncated.
    """
    index = folder / INDEX
    if index.is_file():
        names = _named_in(index)
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise ModelError(f"{folder}: no {SINGLE} and no {INDEX}")
    files = [folder / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(f"{folder}: missing {', '.join(missing)}, which {INDEX} names")
    for file in files:
        _check_length(file)
    return files


def _named_in(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: damaged: expected a JSON object with a weight_map") from error


def _check_length(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        if len(head) < 8:
            raise ModelError(f"{file}: truncated, {size} bytes")
        (header_bytes,) = struct.unpack("<Q", head)
        if header_bytes > size:
            raise ModelError(f"{file}: truncated or no safetensors file: header of {header_bytes} bytes in {size}")
        try:
            header = json.loads(stream.read(header_bytes))
        except ValueError as error:
            raise ModelError(f"{file}: no safetensors file: its header is not JSON") from error
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if (whole := 8 + header_bytes + max(ends, default=0)) != size:
        raise ModelError(f"{file}: truncated, {size} of {whole} bytes")


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in the folder's weight files, one at a time.

    Raises:
        ModelError: as `weight_files`, or a file that safetensors refuses.
    """
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (not a dict)
                    yield name, reader.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{file}: {error}") from error


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, read from the headers alone."""
    shapes = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (not a dict)
                shapes[name] = tuple(reader.get_slice(name).get_shape())
    return shapes


def load_weights(model: nn.Module, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Fill a model that was built on the meta device, tensor by tensor.

    Args:
        model: its parameters are replaced; names are those of the folder.
        folder: a Hugging Face folder.
        dtype: what floating-point weights become.
        device: where they go.

    Raises:
        ModelError: missing, unexpected or mis-shaped tensors, before anything is allocated.
    """
    shared = {"lm_head.weight"} if getattr(model, "tied", False) else set()
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False) if name not in shared}
    held = tensor_shapes(folder)
    found = {name: shape for name, shape in held.items() if name not in shared and not name.endswith(NOT_WEIGHTS)}
    problems = [f"missing {name} {list(wanted[name])}" for name in wanted.keys() - found.keys()]
    problems += [f"unexpected {name} {list(found[name])}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(found[name])} and should be {list(wanted[name])}"
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    if problems:
        more = f"; and {len(problems) - NAMED_PROBLEMS} more" if len(problems) > NAMED_PROBLEMS else ""
        named = "; ".join(sorted(problems)[:NAMED_PROBLEMS])
        raise ModelError(f"{folder}: weights do not fit config.json: {named}{more}")
    for name, tensor in read_tensors(folder):
        if name in wanted:
            parent = model.get_submodule(name.rpartition(".")[0])
            # A copy even where nothing changes: one tensor in the mapped file would keep all of its pages resident.
            value = tensor.to(device=device, dtype=dtype, copy=True)
            setattr(parent, name.rpartition(".")[2], nn.Parameter(value, requires_grad=False))


def require_room(folder: Path, needed_bytes: int, what: str) -> None:
    """Refuse to begin writing what the disk cannot hold.

    Raises:
        CheckpointError: with the sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CheckpointError(
            f"no room for {what}: {folder} has {free / 2**20:.0f} MiB free and needs {needed_bytes / 2**20:.0f} MiB"
        )


def save_weights(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `config.json` and the weights, sharded with an index where they are many, as transformers reads them.

    Raises:
        CheckpointError: no room on the disk.
    """
    require_room(folder, sum(t.numel() * t.element_size() for t in tensors.values()), "the model")
    shards = _shards(tensors)
    names = (
        [SINGLE] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in _count(shards)]
    )
    for name, shard in zip(names, shards, strict=True):
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in shard.items()}
        save_file(contiguous, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**config, "dtype": dtype, "torch_dtype": dtype})


def _count(shards: list[dict[str, Tensor]]) -> range:
    return range(1, len(shards) + 1)


def _shards(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > MAX_SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    return shards


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name, then rename: a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
