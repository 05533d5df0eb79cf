"""When the state of a run is saved, which checkpoints are kept, and which one a run goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tuner.types import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class Checkpoints:
    """The keys; `tuner.checkpoint.store.CheckpointStore` does what they say in a run folder.

    Args:
        resume: `auto` continues an unfinished run in `out`, `never` refuses a folder that holds one, and a path begins
            in a new `out` from another run's newest checkpoint (`RUN`), from that of a step (`RUN@STEP`) or from a
            checkpoint folder.
        every_steps: optimizer steps between checkpoints; None: not by steps.
        every_minutes: of the clock between checkpoints; None: not by the clock.
        every_epoch: also at the end of each epoch.
        keep_last: how many of the newest are kept.
        keep_best: how many of those with the smallest validation loss are kept beside them; with 1 or more, one is also
            saved when an evaluation is better than all before.
        asynchronous: copy the state in memory and write the copy behind the next steps.
        on_error: what happens when one cannot be written: `stop` ends the run, `continue` says so and trains on.
        save_adapter: leave `adapter/` at the end and, for each epoch before the last, under `epochs/`.
        save_merged: the same with `model/`, the whole weights with the adapter merged in; full training leaves `model/`
            at the end in any case.
    """

    resume: str
    every_steps: PositiveInt | None
    every_minutes: PositiveFloat | None
    every_epoch: bool
    keep_last: PositiveInt
    keep_best: NonNegativeInt
    asynchronous: bool
    on_error: Literal["stop", "continue"]
    save_adapter: bool
    save_merged: bool
