"""The checkpoints of one run folder: written behind the training steps, kept as the keys say, restored if whole."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from tuner.checkpoint import folder as files
from tuner.checkpoint.behind import Behind
from tuner.checkpoint.default import Checkpoints
from tuner.checkpoint.random_states import set_random_states
from tuner.checkpoint.snapshot import Snapshot, put_back, take
from tuner.errors import CheckpointError
from tuner.types import State

MOMENTS_BYTES = 8
"""Two fp32 moments of a parameter: what an optimizer keeps, before it has made them."""


@dataclass(frozen=True)
class Restored:
    """Where a run goes on from.

    Attributes:
        folder: the checkpoint.
        notes: what a person should know about it.
    """

    folder: Path
    notes: tuple[str, ...]


class CheckpointStore:
    """Saves and restores the state of the run in `out`; a context that ends when what is being written is written.

    Args:
        out: the run folder.
        keys: when, how many and what on errors.
        base: fingerprint of the frozen base; None where nothing is frozen or the weights are random.
        origin: a checkpoint of another run, from which a run without checkpoints of its own begins.
    """

    def __init__(self, out: Path, keys: Checkpoints, base: str | None = None, origin: Path | None = None) -> None:
        self.out, self.keys = out, keys
        self._base, self._origin = base, origin
        self._behind = Behind()
        self._safe: set[Path] = set()  # those that this process wrote or has verified
        self._problems: list[str] = []
        self._random_states: dict[str, Any] | None = None
        self._last_save_s = time.monotonic()

    def __enter__(self) -> CheckpointStore:
        """Training begins: put the random generators back once more, as imports and loggers have drawn from them."""
        if self._random_states is not None:
            set_random_states(self._random_states)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for what is being written; `problems` tells what went wrong with it, where that does not end the run.

        Raises:
            CheckpointError: it could not be written, `on_error` is `stop`, and this is left for no other error.
        """
        failed = self._behind.wait()
        if failed is not None and error is not None:
            error.add_note(str(failed))
        else:
            self._settle(failed, must=False)

    @property
    def is_writing(self) -> bool:
        """Whether one is being written now."""
        return self._behind.is_alive

    def due(self, step: int, *, ends_epoch: bool, is_best: bool) -> bool:
        """Whether the state after this step is to be saved.

        Args:
            step: optimizer steps done.
            ends_epoch: it was an epoch's last.
            is_best: its validation loss is the smallest so far.
        """
        keys = self.keys
        by_step = keys.every_steps is not None and step % keys.every_steps == 0
        elapsed_s = time.monotonic() - self._last_save_s
        by_clock = keys.every_minutes is not None and elapsed_s >= 60 * keys.every_minutes
        return by_step or by_clock or (ends_epoch and keys.every_epoch) or (is_best and keys.keep_best > 0)

    def save(self, state: State, val_loss: float | None, *, wait: bool = False) -> Path:
        """Save the state as it is now, and drop what is beyond `keep_last` and `keep_best` once it is safe.

        With `asynchronous` this returns as soon as the state is copied; what goes wrong then, `problems` tells.

        Args:
            state: between two steps.
            val_loss: of this very state, None if it was not evaluated.
            wait: until it is written.

        Returns:
            Where it is or will be.

        Raises:
            CheckpointError: it could not be written, and `on_error` is `stop` or `wait` is asked for; or the one before
                could not, and `on_error` is `stop`. Nothing half-written is left.
        """
        folder = files.folder_of(self.out, state.step)
        self._settle(self._behind.wait(), must=False)  # of the one before, which keeps nobody from trying again
        if folder in self._safe:
            return folder
        behind = self.keys.asynchronous and not wait
        snapshot = take(state, copy=behind)
        self._last_save_s = time.monotonic()
        self._behind.start(lambda: self._write(folder, snapshot, val_loss))
        if not behind:
            self._settle(self._behind.wait(), must=wait)
        return folder

    def problems(self) -> list[str]:
        """What went wrong behind the steps since this was asked last, where `on_error` is `continue`.

        Raises:
            CheckpointError: the same, where it is `stop`.
        """
        self._settle(self._behind.ended(), must=False)
        said, self._problems = self._problems, []
        return said

    def restore(self, state: State, total_steps: int) -> Restored | None:
        """Continue from the newest checkpoint that is whole, or begin from `origin`; None where there is neither.

        Args:
            state: newly made; it becomes the saved one.
            total_steps: that the run is to have at its end.

        Raises:
            CheckpointError: none is whole though there are some; it is of a run on another base, with other trainable
                parameters, another optimizer or other data, or has more steps than are asked for.
        """
        files.remove_unfinished(self.out)
        folder, notes = newest_whole(self.out)
        if folder is None and self._origin is not None:
            folder = whole_or_refused(self._origin)
        if folder is None:
            return None
        manifest = files.manifest_of(folder)
        self._require_base(folder, manifest["base"])
        if (done := manifest["step"]) > total_steps:  # a checkpoint that was copied may have any name
            raise CheckpointError(
                f"{self.out} has done {done} steps and {total_steps} are asked for; say train.max_steps={done} or more,"
                " or another out"
            )
        snapshot = files.read(folder)
        put_back(snapshot, state, folder)
        self._random_states = snapshot.training["rng"]
        self._safe.add(folder)
        return Restored(folder, tuple(notes))

    def require_room(self, state: State, results_bytes: int, *, one_epoch: bool) -> None:
        """Refuse to begin a run whose checkpoints and results the disk cannot hold.

        An old checkpoint is removed after the new one is whole, so there is one more than are kept for a while.

        Args:
            state: newly made.
            results_bytes: what is written at the end, while the checkpoints are still there.
            one_epoch: the run ends within its first.

        Raises:
            CheckpointError: with the sizes.
        """
        keys = self.keys
        trained = [p for p in state.model.parameters() if p.requires_grad]
        meanwhile = keys.every_steps or keys.every_minutes or keys.keep_best or (keys.every_epoch and not one_epoch)
        copies = keys.keep_last + keys.keep_best + 1 if meanwhile else 1
        copies = max(1, copies - len(files.checkpoints_of(self.out)))
        needed = copies * sum(p.numel() * (p.element_size() + MOMENTS_BYTES) for p in trained) + results_bytes
        existing = next(folder for folder in [self.out, *self.out.parents] if folder.is_dir())
        if (free := shutil.disk_usage(existing).free) < needed:
            what = "a checkpoint" if copies == 1 else f"{copies} checkpoints"
            raise CheckpointError(
                f"no room for {what} and the results: they may take {needed / 2**20:.1f} MiB"
                f" and {existing} has {free / 2**20:.1f} MiB free"
            )

    def _write(self, folder: Path, snapshot: Snapshot, val_loss: float | None) -> None:
        try:
            known = val_loss if val_loss is not None and math.isfinite(val_loss) else None
            files.write(folder, snapshot, {"val_loss": known, "base": self._base})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{folder}: cannot be written: {error}; {what_remains(self.out)}") from error
        self._safe.add(folder)
        for old in beyond(self.out, snapshot.step, keep_last=self.keys.keep_last, keep_best=self.keys.keep_best):
            files.remove(old)

    def _settle(self, error: Exception | None, *, must: bool) -> None:
        if error is None:
            return
        if must or self.keys.on_error == "stop":
            raise error
        self._problems.append(f"not saved, training goes on (checkpoint.on_error=continue): {error}")

    def _require_base(self, folder: Path, before: str | None) -> None:
        if before != self._base:
            raise CheckpointError(
                f"{folder}: trained on another base: its fingerprint was {str(before)[:16]} and is"
                f" {str(self._base)[:16]}; give model.path the base as it was"
            )


def newest_whole(out: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that is not damaged, and what is wrong with those after it.

    Raises:
        CheckpointError: all that there are, and there are some, are damaged.
    """
    damaged: list[str] = []
    for folder in reversed(files.checkpoints_of(out)):
        try:
            files.verified(folder)
        except files.Damaged as error:
            damaged.append(f"{folder}: damaged: {error}")
        else:
            return folder, [f"{one}; it is left out, {folder.name} is whole" for one in damaged]
    if damaged:
        raise CheckpointError(f"{'; '.join(damaged)}; remove {out / 'checkpoints'} to begin anew")
    return None, []


def whole_or_refused(folder: Path) -> Path:
    """A checkpoint that somebody chose.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        files.verified(folder)
    except files.Damaged as error:
        raise CheckpointError(f"{folder}: damaged: {error}") from error
    return folder


def what_remains(out: Path) -> str:
    """What a run that breaks off can be continued from, as a clause."""
    saved = files.checkpoints_of(out)
    return f"{saved[-1]} is whole, and the same command with out={out} continues from it" if saved else "none was saved"


def beyond(out: Path, step: int, *, keep_last: int, keep_best: int) -> list[Path]:
    """The checkpoints that are neither among the newest nor among the best, as of `step`.

    What stands behind `step` is damaged, or this step would not have been trained again; it stays until it is replaced.
    """
    saved = [folder for folder in files.checkpoints_of(out) if files.step_of(folder) <= step]
    ranked = sorted((loss, folder) for folder in saved if (loss := _val_loss(folder)) is not None)
    kept = {*saved[-keep_last:], *(folder for _, folder in ranked[:keep_best])}
    return [folder for folder in saved if folder not in kept]


def _val_loss(folder: Path) -> float | None:
    try:
        loss: float | None = files.manifest_of(folder)["val_loss"]
    except files.Damaged:  # then it is not kept for being the best
        return None
    return loss
