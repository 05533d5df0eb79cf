"""What a run leaves for others: at its end, and at the end of each epoch before the last."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.checkpoint.store import what_remains
from tuner.data.batches import Batches
from tuner.errors import CheckpointError
from tuner.models.decoder import Decoder
from tuner.peft.adapter_folder import has_adapter
from tuner.results import Kept, results_bytes, save_results
from tuner.types import Positioned, Tokenizer


@dataclass(frozen=True)
class RunResults:
    """`adapter/` and `model/` of a run folder, and those of its epochs under `epochs/<n>/`.

    Args:
        out: the run folder.
        model: that trains.
        tokenizer: saved beside whole weights.
        kept: which of the two are asked for; full training leaves `model/` at its end in any case.
        facts: of the base, as `tuner.results.save_results` takes them.
    """

    out: Path
    model: Decoder
    tokenizer: Tokenizer
    kept: Kept
    facts: Mapping[str, Any]

    @property
    def are_there(self) -> bool:
        """Whether the run folder holds what a run leaves at its end."""
        return any((self.out / name).is_dir() for name in ("adapter", "model"))

    def write(self) -> list[Path]:
        """Write what the run leaves at its end.

        Returns:
            The folders that are small enough to keep with a tracked run.

        Raises:
            CheckpointError: no room on the disk.
        """
        adapted = has_adapter(self.model)
        kept = Kept(self.kept.adapter and adapted, self.kept.merged or not adapted)
        for name, is_kept in (("adapter", kept.adapter), ("model", kept.merged)):
            if not is_kept:  # of an earlier end, and so of other weights
                shutil.rmtree(self.out / name, ignore_errors=True)
        self._save(self.out, kept)
        return [self.out / "adapter"] if kept.adapter else []

    def write_epoch(self, number: int) -> None:
        """Write those of an epoch that has ended, counted from 1.

        Raises:
            CheckpointError: no room on the disk.
        """
        self._save(
            self.out / "epochs" / str(number), Kept(self.kept.adapter and has_adapter(self.model), self.kept.merged)
        )

    def num_bytes(self, batches: Positioned, total_steps: int) -> int:
        """Of all that has yet to be written; a stream does not know its epochs beforehand, so those are not counted."""
        numbers: list[int] = []
        if isinstance(batches, Batches):
            ended = range(1, (total_steps - 1) // batches.steps_per_epoch + 1)
            numbers = [number for number in ended if not (self.out / "epochs" / str(number)).is_dir()]
        return results_bytes(self.model, self.kept, len(numbers))

    def _save(self, folder: Path, kept: Kept) -> None:
        try:
            save_results(self.model, self.tokenizer, folder, kept, facts=self.facts, run=self.out)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {what_remains(self.out)}") from error
