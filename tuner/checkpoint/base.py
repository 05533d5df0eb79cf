"""Which frozen base a run trains on, told by a fingerprint that does not read all of it.

A checkpoint holds what trains and not the base, which may have 140 GB. Instead of the whole, its files' sizes, the
headers of its safetensors (names, types, shapes and places of all tensors), its config.json and sampled blocks are
digested: another model, another fine-tuning, a truncated or half-copied file, other quantized weights are seen; a few
bytes changed between the samples are not.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tuner.errors import CheckpointError

KINDS = ("*.safetensors", "*.bin", "*.index.json", "config.json")
BLOCK = 2**16
"""Bytes of a sample, which is a read or two of any disk."""
BLOCKS = 32
"""Of each file: 2 MiB, so 60 MiB of thirty files of 5 GB."""
WHOLE = BLOCK * BLOCKS
"""A smaller file is read whole."""


def base_fingerprint(folder: Path) -> str:
    """sha256, in hex, of a Hugging Face folder's weights and shape; the same wherever the folder is.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for file in sorted({file for kind in KINDS for file in folder.glob(kind)}):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            digest.update(_sampled(file).digest())
    except OSError as error:
        raise CheckpointError(f"{folder}: the base cannot be read: {error}") from error
    return digest.hexdigest()


def _sampled(file: Path) -> hashlib._Hash:
    digest, size = hashlib.sha256(), file.stat().st_size
    with file.open("rb") as opened:
        if size <= WHOLE:
            digest.update(opened.read())
            return digest
        header = int.from_bytes(opened.read(8), "little") if file.suffix == ".safetensors" else 0
        starts = [0, *(number * (size - BLOCK) // (BLOCKS - 1) for number in range(BLOCKS))]
        for start, length in zip(starts, [8 + min(header, size), *[BLOCK] * BLOCKS], strict=True):
            opened.seek(start)
            digest.update(opened.read(length))
    return digest
