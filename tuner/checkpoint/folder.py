"""A checkpoint on disk: a folder that is whole and says so itself, or is not used.

`checkpoints/step-00000050` holds `trainable.safetensors`, `training.pt` and `manifest.json` with the size and sha256 of
both. It is written beside its place under another name, flushed to the disk and then renamed. A disk that lost or
garbled bytes since is found out by the manifest before anything of a run is touched.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuner.checkpoint.snapshot import COUNTERS, Snapshot
from tuner.errors import CheckpointError

WEIGHTS = "trainable.safetensors"
TRAINING = "training.pt"
MANIFEST = "manifest.json"
FORMAT = 1
"""Of the manifest and of what it lists."""


class Damaged(Exception):
    """A checkpoint that is not what was written: the file and what is wrong with it."""


def checkpoints_of(out: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; each was whole once."""
    return sorted((out / "checkpoints").glob("step-*"))


def folder_of(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def write(folder: Path, snapshot: Snapshot, facts: Mapping[str, Any]) -> None:
    """Make `folder` a whole checkpoint, in place of what may be there.

    Args:
        folder: of a run; its parent is made.
        snapshot: everything in it.
        facts: for the manifest, plain: what is asked about a checkpoint without reading it.

    Raises:
        OSError, SafetensorError, RuntimeError: no room, no right; nothing half-written is left.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _require_room(unfinished, snapshot.num_bytes)
        save_file(dict(snapshot.weights), unfinished / WEIGHTS)
        torch.save(dict(snapshot.training), unfinished / TRAINING)
        files = {name: _size_and_sum(unfinished / name) for name in (WEIGHTS, TRAINING)}
        manifest = {"format": FORMAT, "step": snapshot.step, **facts, "files": files}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for file in unfinished.iterdir():
            flush(file)
        flush(unfinished)
        if folder.exists():
            remove(folder)
        unfinished.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove(folder: Path) -> None:
    """Take a checkpoint away; a process that is killed meanwhile leaves nothing that looks like one."""
    condemned = folder.with_name(f".{folder.name}.removed.unfinished")
    shutil.rmtree(condemned, ignore_errors=True)
    folder.rename(condemned)
    shutil.rmtree(condemned)


def remove_unfinished(out: Path) -> None:
    """Take away what a process that was killed while it saved has left."""
    for folder in (out / "checkpoints").glob(".step-*.unfinished"):
        shutil.rmtree(folder)


def manifest_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        Damaged: it says nothing that can be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise Damaged(f"{MANIFEST}: format {manifest['format']}, this version reads {FORMAT}")
        found: dict[str, Any] = {name: manifest[name] for name in ("step", "val_loss", "base", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{MANIFEST}: {_first_line(error)}") from error
    return found


def verified(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what was written.

    Raises:
        Damaged: naming the first file that is not.
    """
    manifest = manifest_of(folder)
    for name in (WEIGHTS, TRAINING):
        try:
            expected, found = manifest["files"][name], _size_and_sum(folder / name)
        except (OSError, KeyError, TypeError) as error:
            raise Damaged(f"{name}: {_first_line(error)}") from error
        if found["bytes"] != expected["bytes"]:
            raise Damaged(f"{name}: {found['bytes']} bytes of {expected['bytes']}")
        if found != expected:
            raise Damaged(f"{name}: its sha256 is not the one in {MANIFEST}")
    return manifest


def read(folder: Path) -> Snapshot:
    """The snapshot of a checkpoint that is `verified`.

    Nothing in it is executed, whoever wrote it: safetensors hold numbers, and torch's unpickler is asked for
    `weights_only`.

    Raises:
        CheckpointError: it holds something else all the same.
    """
    weights = read_weights(folder)
    try:
        training = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
        found = {name: training[name] for name in ("optimizer", "batches", "rng", *COUNTERS)}
        found["loss_scale"] = training.get("loss_scale")  # of an earlier version there is none
        found["rows"] = training.get("rows", {})  # likewise
    except Exception as error:  # there is no end to what bytes that somebody made can make an unpickler raise
        raise CheckpointError(f"{folder / TRAINING}: damaged: {_first_line(error)}") from error
    return Snapshot(weights, found)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The parameters that train, by name.

    Raises:
        CheckpointError: the file is damaged or missing.
    """
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS}: damaged: {_first_line(error)}") from error


def _require_room(folder: Path, num_bytes: int) -> None:
    """Raise the OSError of a full disk before it is one: until the writing fails, metrics would find no room either."""
    if shutil.disk_usage(folder).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _size_and_sum(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": os.fstat(opened.fileno()).st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def flush(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
