"""A safetensors file that is written tensor by tensor, so that no more than one of them is held.

The library's own `save_file` wants all of a file's tensors at once: gigabytes, where each is made as it is written. The
format is a length, a JSON header with the place of each tensor, and their bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What the format calls the dtypes of weights."""

ALIGNMENT_BYTES = 8
"""The header is filled up with spaces to a multiple of it, as the library does: readers map the tensors behind it."""

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of tensors by their names, in the order in which they are written."""


def bytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Size of a tensor."""
    return dtype.itemsize * torch.Size(shape).numel()


def write_tensors(file: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors as they come.

    Args:
        file: made anew.
        layout: of all of them.
        tensors: name and value of each, on the CPU and contiguous, in the order of `layout`.

    Raises:
        ValueError: they are not those of `layout`.
        OSError: no room on the disk.
    """
    with file.open("wb") as stream:
        stream.write(_header(layout))
        for (name, tensor), (expected, (dtype, shape)) in zip(tensors, layout.items(), strict=True):
            if (name, tensor.dtype, tuple(tensor.shape)) != (expected, dtype, shape):
                raise ValueError(f"{file}: {name} {tensor.dtype} {tuple(tensor.shape)} where {expected} was to come")
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _header(layout: Layout) -> bytes:
    """The length and the JSON of where each tensor lies behind it."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + bytes_of(dtype, shape)
        described[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text
