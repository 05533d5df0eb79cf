"""Checkpoints of the training state: what resuming needs, and nothing of the frozen base.

A checkpoint is a folder `checkpoints/step-00000050` that is written under another name, flushed to the disk and then
renamed, so that it is whole or not there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuner.errors import CheckpointError
from tuner.types import PositiveInt, State

WEIGHTS = "trainable.safetensors"
TRAINING = "training.pt"
COUNTERS = ("step", "tokens", "seconds", "train_loss", "val_loss_before", "before")


class Checkpoints:
    """When and where the state of a run is saved.

    Args:
        resume: `auto` continues an unfinished run in `out`, `never` refuses a folder that holds one.
        every_steps: optimizer steps between checkpoints; None saves when stopped only.
        keep_last: how many are kept.
    """

    def __init__(
        self, resume: Literal["auto", "never"], every_steps: PositiveInt | None, keep_last: PositiveInt
    ) -> None:
        self.resume = resume
        self.every_steps = every_steps
        self.keep_last = keep_last

    def due(self, step: int) -> bool:
        return self.every_steps is not None and step % self.every_steps == 0

    def require_room(self, out: Path, state: State, results_bytes: int) -> None:
        """Refuse to begin a run whose checkpoints and results the disk cannot hold.

        A checkpoint is the weights and two fp32 moments of what trains. An old one is removed after the new one is
        whole, so there is one more than `keep_last` for a while.

        Args:
            out: the run folder.
            state: newly made.
            results_bytes: what is written at the end, while the checkpoints are still there.

        Raises:
            CheckpointError: with the sizes.
        """
        trained = [p for p in state.model.parameters() if p.requires_grad]
        copies = 1 if self.every_steps is None else self.keep_last + 1
        copies = max(1, copies - len(whole_checkpoints(out)))
        needed = copies * sum(p.numel() * (p.element_size() + 8) for p in trained) + results_bytes
        existing = next(folder for folder in [out, *out.parents] if folder.is_dir())
        if (free := shutil.disk_usage(existing).free) < needed:
            what = "a checkpoint" if copies == 1 else f"{copies} checkpoints"
            raise CheckpointError(
                f"no room for {what} and the results: they may take {needed / 2**20:.1f} MiB"
                f" and {existing} has {free / 2**20:.1f} MiB free"
            )

    def save(self, out: Path, state: State) -> Path:
        """Write `out/checkpoints/step-<step>` and drop the oldest beyond `keep_last`.

        Raises:
            CheckpointError: no room on the disk; nothing half-written is left.
        """
        folder = out / "checkpoints" / f"step-{state.step:08d}"
        if folder.is_dir():
            return folder
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        try:
            _remove_unfinished(out)
            unfinished.mkdir(parents=True)
            save_file(trainable_tensors(state), unfinished / WEIGHTS)
            torch.save(_training(state), unfinished / TRAINING)
            for file in unfinished.iterdir():
                _flush(file)
            unfinished.rename(folder)
            _flush(folder.parent)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise CheckpointError(f"{folder}: cannot be written: {error}; {what_remains(out)}") from error
        for old in whole_checkpoints(out)[: -self.keep_last]:
            shutil.rmtree(old)
        return folder

    def restore(self, out: Path, state: State, total_steps: int) -> bool:
        """Continue from the newest checkpoint of `out`; False where there is none.

        Args:
            out: the run folder.
            state: newly made; it becomes the saved one.
            total_steps: that the run is to have at its end.

        Raises:
            CheckpointError: the checkpoint is damaged, of a run with other trainable parameters or other data, or has
                more steps than are asked for.
        """
        _remove_unfinished(out)
        saved = whole_checkpoints(out)
        if not saved:
            return False
        training = _read_training(saved[-1] / TRAINING)
        if (done := training["step"]) > total_steps:
            raise CheckpointError(
                f"{out} has done {done} steps and {total_steps} are asked for; say train.max_steps={done} or more, "
                "or another out"
            )
        state.batches.load_state_dict(training["batches"])
        load_trainable(state.model, saved[-1])
        try:
            state.optimizer.load_state_dict(training["optimizer"])
        except (ValueError, KeyError) as error:
            raise _damaged(saved[-1] / TRAINING, error) from error
        for name in COUNTERS:
            setattr(state, name, training[name])
        torch.set_rng_state(training["rng"]["cpu"])
        if "cuda" in training["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(training["rng"]["cuda"])
        return True


def whole_checkpoints(out: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def what_remains(out: Path) -> str:
    """What a run that breaks off can be continued from, as a clause."""
    saved = whole_checkpoints(out)
    return f"{saved[-1]} is whole, and the same command with out={out} continues from it" if saved else "none was saved"


def trainable_tensors(state: State) -> dict[str, Tensor]:
    """Every parameter that trains, by name."""
    named = state.model.named_parameters()
    return {name: p.detach().cpu().contiguous() for name, p in named if p.requires_grad}


def load_trainable(model: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights into the parameters that train.

    Raises:
        CheckpointError: it is damaged or holds other parameters.
    """
    try:
        tensors = load_file(checkpoint / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise _damaged(checkpoint / WEIGHTS, error) from error
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    differing = sorted(parameters.keys() ^ tensors.keys())
    differing += [
        f"{name} is {list(tensors[name].shape)}, not {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if differing:
        raise CheckpointError(f"{checkpoint}: made with other trainable parameters: {', '.join(differing[:3])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _training(state: State) -> dict[str, Any]:
    rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state_all()
    counters = {name: getattr(state, name) for name in COUNTERS}
    return {
        "optimizer": state.optimizer.state_dict(),
        "batches": state.batches.state_dict(),
        "rng": rng,
        **counters,
    }


def _read_training(file: Path) -> dict[str, Any]:
    """What `_training` made.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        training = torch.load(file, map_location="cpu", weights_only=True)
        return {name: training[name] for name in ("optimizer", "batches", "rng", *COUNTERS)}
    except Exception as error:  # there is no end to what garbled bytes can make an unpickler raise
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> CheckpointError:
    """The error for a file of a checkpoint, with the checkpoint before it, if there is one."""
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    older = [folder for folder in whole_checkpoints(file.parents[2]) if folder.name < file.parent.name]
    remedy = f"; to continue from {older[-1]}, remove {file.parent}" if older else ""
    return CheckpointError(f"{file}: damaged: {reason}{remedy}")


def _remove_unfinished(out: Path) -> None:
    """Take away what a process that was killed while it saved has left."""
    for folder in (out / "checkpoints").glob(".step-*.unfinished"):
        shutil.rmtree(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
