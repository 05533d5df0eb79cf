"""Weights in a Hugging Face folder: `config.json` and one file or many with an index, safetensors or torch's `.bin`."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuner.errors import ModelError
from tuner.models.decoder import Decoder
from tuner.models.fit import require_fit
from tuner.models.stored import replace_parameter, stored_parts, stored_shapes
from tuner.models.torch_files import load_tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SINGLE = "pytorch_model.bin"
SAFETENSORS = ".safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored as, by the names of safetensors: a cast of any other would not be the weight."""

NOT_WEIGHTS = "rotary_emb.inv_freq"
"""End of the names of buffers that older exports of Llama 2 hold, and that follow from the configuration."""


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
    """The weight files of a folder, each of which exists: safetensors, which are whole, or else `.bin`.

    Raises:
        ModelError: none, one that the index names is missing, or one that is truncated.
    """
    for index, single in ((INDEX, SINGLE), (BIN_INDEX, BIN_SINGLE)):
        if (folder / index).is_file():
            return _whole_files(folder, index)
        if (folder / single).is_file():
            _check_length(folder / single)
            return [folder / single]
    raise ModelError(f"{folder}: no {SINGLE} and no {INDEX}, nor {BIN_SINGLE} or {BIN_INDEX}")


def _whole_files(folder: Path, index: str) -> list[Path]:
    files = [folder / name for name in _named_in(folder / index)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(f"{folder}: missing {', '.join(missing)}, which {index} names")
    for file in files:
        _check_length(file)
    return files


def _named_in(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: damaged: expected a JSON object with a weight_map") from error
    if wrong := [name for name in names if not isinstance(name, str) or Path(name).name != name or name == ".."]:
        raise ModelError(f"{index}: damaged: weight_map names {wrong[0]!r}, which is no file of this folder")
    return sorted(names)


def _check_length(file: Path) -> None:
    if file.suffix != SAFETENSORS:
        return  # a .bin is found damaged when it is opened
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
    try:
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(f"{file}: no safetensors file: its header does not say where tensors are") from error
    if (whole := 8 + header_bytes + max(ends, default=0)) != size:
        raise ModelError(f"{file}: truncated, {size} of {whole} bytes")


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in the folder's weight files, one at a time.

    Raises:
        ModelError: as `weight_files` and `load_tensors`, or a file that safetensors refuses.
    """
    for file in weight_files(folder):
        if file.suffix != SAFETENSORS:
            yield from load_tensors(file).items()
            continue
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (not a dict)
                    yield name, reader.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{file}: {error}") from error


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, read from the headers alone.

    Raises:
        ModelError: as `weight_files`, or tensors that are no plain numbers, as in a folder that was quantized.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    others: dict[str, str] = {}
    for file in weight_files(folder):
        if file.suffix != SAFETENSORS:
            for name, tensor in load_tensors(file).items():
                shapes[name] = tuple(tensor.shape)
                if tensor.dtype not in FLOATS.values():
                    others[name] = str(tensor.dtype).removeprefix("torch.")
            continue
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (not a dict)
                header = reader.get_slice(name)
                shapes[name] = tuple(header.get_shape())
                if header.get_dtype() not in FLOATS:
                    others[name] = header.get_dtype()
    if others:
        raise ModelError(
            f"{folder}: {', '.join(f'{name} is {kind}' for name, kind in others.items())}; valid: {', '.join(FLOATS)}; "
            "was this folder quantized?"
        )
    return shapes


def require_weights(folder: Path, wanted: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    """Refuse a folder whose tensors are not those of a model; a tied head may be there as well, equal to the embedding.

    Raises:
        ModelError: naming every tensor that is missing, unexpected or of another shape, or a head that differs.
    """
    held = tensor_shapes(folder)
    shared = {HEAD} if tied else set()
    found = {name: shape for name, shape in held.items() if name not in shared and not name.endswith(NOT_WEIGHTS)}
    require_fit(f"{folder}: weights do not fit config.json", wanted, found)
    if tied and HEAD in held:
        ends = {name: tensor for name, tensor in read_tensors(folder) if name in (HEAD, EMBEDDING)}
        if not torch.equal(ends[HEAD], ends[EMBEDDING]):
            raise ModelError(
                f"{folder}: config.json says tie_word_embeddings, and {HEAD} is another matrix than {EMBEDDING}; "
                "set it to false where the head is the model's own"
            )


def load_weights(
    model: Decoder,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    arrived: Callable[[str], None] = lambda path: None,
) -> None:
    """Fill a model that was built on the meta device, tensor by tensor.

    Args:
        model: its parameters are replaced.
        folder: a Hugging Face folder.
        dtype: what floating-point weights become.
        device: where they go.
        arrived: called with the path of each module once all of its own parameters are there; it may replace the
            module, so that the whole model never exists in the form it was loaded in.

    Raises:
        ModelError: missing, unexpected or mis-shaped tensors, before anything is allocated.
    """
    wanted, parts = stored_shapes(model), stored_parts(model)
    require_weights(folder, wanted, tied=model.tied)
    rows = {name: parameter.shape[0] for name, parameter in model.named_parameters()}
    for stored, tensor in read_tensors(folder):
        if stored in wanted:
            pieces = torch.split(tensor, [rows[name] for name in parts[stored]])
            for name, piece in zip(parts[stored], pieces, strict=True):
                # A copy even where nothing changes: one tensor in the mapped file would keep all of its pages resident.
                value = piece.to(device=device, dtype=dtype, copy=True)
                module = replace_parameter(model, name, value)
                if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                    arrived(name.rpartition(".")[0])
