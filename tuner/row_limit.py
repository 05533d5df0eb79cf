"""How many rows go through the model at once: as many as a batch has, until memory runs out, then half as many.

What a step learns stays the same but for the order of sums, since each batch counts by its trained tokens among those
of the whole window, and so does a mean over all tokens of an evaluation.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tuner.out_of_memory import ADVICE, is_out_of_memory, what_was_asked, without_frames

if TYPE_CHECKING:
    from tuner.types import Batch

Result = TypeVar("Result")


@dataclass
class RowLimit:
    """The most rows of a batch that go through the model at once.

    Attributes:
        halves: whether memory that runs out halves it (`train.on_oom=retry`), or ends the run.
        most: None while memory has not run out, which is as many as a batch has.
    """

    halves: bool = False
    most: int | None = None

    def parts(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches, those with more rows cut."""
        most = self.most
        return list(batches) if most is None else [part for batch in batches for part in batch.cut(most)]

    def within(
        self,
        compute: Callable[[list[Batch]], Result],
        batches: Sequence[Batch],
        what: str,
        undo: Callable[[], None] | None = None,
    ) -> tuple[Result, list[Batch]]:
        """Compute on batches in parts, once more in halves whenever memory runs out; each halving is warned of.

        Args:
            compute: on the parts, all of them anew.
            batches: at least one, of rows.
            what: that is, for messages, as `step 3`.
            undo: drops what `compute` has left behind when it broke off; None where that is nothing.

        Returns:
            What `compute` gave and the parts it gave it for.

        Raises:
            OutOfMemory: there is no room for one row, or it is not to be halved.
        """
        while True:
            parts = self.parts(batches)
            largest = max(parts, key=lambda part: part.num_rows)
            try:
                return compute(parts), parts
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                asked = what_was_asked(error)
                if largest.num_rows == 1 or not self.halves:
                    raise without_frames(error, _ending(what, largest, asked)) from None
            # Out of `except` nothing holds the error, whose traceback holds the activations.
            if undo is not None:
                undo()
            _give_back()
            self.most = -(-largest.num_rows // 2)
            warnings.warn(
                f"out of memory: {what} with batches of {largest.num_rows} rows: {asked}; from here on they have "
                f"{self.most}, and there are as many more of them: the same rows make a step",
                stacklevel=2,
            )


def _ending(what: str, batch: Batch, asked: str) -> str:
    rows, tokens = batch.tokens.shape
    of = f"{rows} row{'s' * (rows > 1)} of {tokens} tokens"
    if rows == 1:
        return f"out of memory: {what} with a batch of {of}, which cannot be halved: {asked}; {ADVICE}"
    advice = "train.on_oom=retry goes on with half as many rows at once in twice as many batches"
    return f"out of memory: {what} with batches of {of}: {asked}; {advice}; {ADVICE}"


def _give_back() -> None:
    """Give memory that nobody uses any more back to the device, so that it can be cut up anew."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # nothing where CUDA was not started
