"""Ending a run whose validation loss no longer falls.

What counts is as in Keras' EarlyStopping and Hugging Face's EarlyStoppingCallback: the first evaluation of a model that
has trained is the first to be measured against. The loss before the first step is not: a run may get worse before it
gets better, as new tokens or a high rate make it, and the untrained model is none that it could leave.

Where they differ it is as in Keras: a loss is measured against the last improvement, so one that falls slowly, yet by
more than `min_delta` since then, goes on. The callback measures it against the lowest of all, and so asks that much of
a single evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuner.types import State


@dataclass(frozen=True)
class EarlyStopping:
    """When to give up.

    Args:
        patience: evaluations without improvement that end the run; None goes on whatever happens.
        min_delta: what the validation loss has to fall by, in nats, and more than that, to be an improvement.
    """

    patience: int | None
    min_delta: float

    def count(self, state: State, loss: float) -> bool:
        """Take notice of an evaluation of `state`; one that is not finite is never an improvement, nor the best.

        Returns:
            Whether the loss is the lowest so far, be it by however little.
        """
        is_best = loss < (math.inf if state.best_val_loss is None else state.best_val_loss)  # never true of NaN
        if is_best:
            state.best_val_loss, state.best_step = loss, state.step
        before = math.inf if state.improved_val_loss is None else state.improved_val_loss
        if loss < before - self.min_delta:
            state.improved_val_loss, state.improved_step, state.evaluations_since_improved = loss, state.step, 0
        else:
            state.evaluations_since_improved += 1
        return is_best

    def reason(self, state: State) -> str | None:
        """Why the run of `state` ends here, None where it goes on."""
        waited = state.evaluations_since_improved
        if self.patience is None or waited < self.patience:
            return None
        where, when = f"early stopping at step {state.step}", f"in {waited} evaluation{'s' if waited > 1 else ''}"
        if state.improved_val_loss is None:
            return f"{where}: validation loss was not finite {when}"
        improved = f"{state.improved_val_loss:.4f} (step {state.improved_step})"
        return f"{where}: validation loss has not fallen by more than {self.min_delta:g} below {improved} {when}"
