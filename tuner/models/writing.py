"""Weights into a Hugging Face folder: safetensors files, an index, `config.json`.

Where shapes are known beforehand (`save_weights`) one tensor is held at a time, else (`write_weights`) those of a file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tuner.errors import CheckpointError, ModelError
from tuner.models.folder import INDEX, SINGLE
from tuner.models.stored import Part, stacked, stacked_shape
from tuner.models.tensor_file import bytes_of, write_tensors

MAX_SHARD_BYTES = 5_000_000_000
"""transformers' own default is 5 GB a file up to version 4."""


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


def save_weights(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[Part, ...]]) -> None:
    """Write `config.json` and the weights of a model in memory, of which no more than one is made at a time.

    Args:
        folder: made if it is not there.
        config: what `config.json` says, but for the dtype, which is that of the first tensor.
        tensors: by their names in the folder, each as the parts it is stacked of; at least one.

    Raises:
        CheckpointError: no room on the disk.
    """
    layout = {name: (parts[0].dtype, stacked_shape(parts)) for name, parts in tensors.items()}
    require_room(folder, sum(bytes_of(*each) for each in layout.values()), "the model")
    written: list[tuple[Path, list[str]]] = []
    for names in _files({name: bytes_of(*each) for name, each in layout.items()}):
        temporary = folder / f".shard-{len(written) + 1:05d}"
        written.append((temporary, names))
        held = {name: layout[name] for name in names}
        write_tensors(temporary, held, ((name, stacked(tensors[name])) for name in names))
    _name(folder, written, sum(bytes_of(*each) for each in layout.values()))
    _write_config(folder, config, next(iter(layout.values()))[0])


def write_weights(
    folder: Path, config: Mapping[str, Any], needed_bytes: int, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write `config.json` and weights, sharded with an index where they are many, as transformers reads them.

    No more than one file's tensors are held at a time, so that `tensors` may make each of them when it is asked for.

    Args:
        folder: made if it is not there.
        config: what `config.json` says, but for the dtype, which is that of the first tensor.
        needed_bytes: size of all tensors, or a little more.
        tensors: name and value of each, on the CPU; at least one.

    Raises:
        CheckpointError: no room on the disk.
    """
    require_room(folder, needed_bytes, "the model")
    written: list[tuple[Path, list[str]]] = []
    total, dtype = 0, None
    for shard in _shards(tensors):
        # How many files there are is in each one's name, and not known before the last.
        temporary = folder / f".shard-{len(written) + 1:05d}"
        written.append((temporary, list(shard)))
        save_file(shard, temporary, metadata={"format": "pt"})
        total += sum(map(_bytes, shard.values()))
        dtype = dtype or next(iter(shard.values())).dtype
        shard.clear()  # or it would be held while the next one fills
    _name(folder, written, total)
    _write_config(folder, config, dtype)


def _write_config(folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**config, "dtype": name, "torch_dtype": name})


def _name(folder: Path, written: list[tuple[Path, list[str]]], total_bytes: int) -> None:
    """Give the files their names and, where they are several, an index."""
    if len(written) == 1:
        written[0][0].replace(folder / SINGLE)
        return
    where: dict[str, str] = {}
    for number, (temporary, held) in enumerate(written, start=1):
        name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        temporary.replace(folder / name)
        where |= dict.fromkeys(held, name)
    write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": where})


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """What goes into each file."""
    shard: dict[str, Tensor] = {}
    filled = 0
    for name, tensor in tensors:
        size = _bytes(tensor)
        if filled and filled + size > MAX_SHARD_BYTES:
            yield shard
            shard, filled = {}, 0
        shard[name] = tensor
        filled += size
    yield shard


def _files(sizes_bytes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names of the tensors in each file."""
    names: list[str] = []
    filled = 0
    for name, size in sizes_bytes.items():
        if filled and filled + size > MAX_SHARD_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as it is written.

    Raises:
        ModelError: a number that fp16, which ends at 65504, has no place for.
    """
    written = weight.to(dtype).contiguous()
    if dtype == torch.float16 and weight.dtype != dtype and bool(written.isinf().any() > weight.isinf().any()):
        raise ModelError(f"{name} holds {float(weight.abs().max()):.6g}, which is too large for fp16: say dtype=bf16")
    return written


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name, then rename: a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
