"""When a run gives up: what counts as an improvement, and what is said of it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tuner.checkpoint.snapshot import COUNTERS, ROW_LIMITS
from tuner.early_stopping import EarlyStopping
from tuner.types import State

NAN, INF = math.nan, math.inf


def state() -> State:
    return State(cast(Any, None), cast(Any, None), cast(Any, None))


def ends_at(losses: Sequence[float], patience: int | None, min_delta: float = 0.0) -> tuple[int | None, State]:
    """The evaluation, counted from 1, after which a run ends that is evaluated every ten steps; and its state."""
    early, run = EarlyStopping(patience, min_delta), state()
    for number, loss in enumerate(losses, start=1):
        assert early.reason(run) is None
        run.step = 10 * number
        lowest = math.inf if run.best_val_loss is None else run.best_val_loss
        assert early.count(run, loss) is (loss < lowest)
        assert run.best_val_loss == (min(lowest, loss) if loss < math.inf or lowest < math.inf else None)
        if early.reason(run) is not None:
            return number, run
    return None, run


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "ended", "improved"),
    [
        ([4.0, 3.0, 2.0, 1.0], 1, 0.0, None, (1.0, 40, 0)),
        ([4.0, 5.0], 1, 0.0, 2, (4.0, 10, 1)),
        ([4.0, 4.0], 1, 0.0, 2, (4.0, 10, 1)),  # as good is no better
        ([4.0, 5.0, 3.0, 3.5, 3.2, 3.1], 3, 0.0, 6, (3.0, 30, 3)),
        ([4.0, 5.0, 5.0, 3.0, 5.0, 5.0], 3, 0.0, None, (3.0, 40, 2)),
        ([4.0, 3.5, 3.5], 2, 0.5, 3, (4.0, 10, 2)),  # by exactly that much is not by more
        ([4.0, 3.75, 3.25, 3.0], 2, 0.5, None, (3.25, 30, 1)),  # since the best, and not since the last
        ([4.0, NAN, NAN], 2, 0.0, 3, (4.0, 10, 2)),
        ([NAN, NAN], 2, 0.0, 2, (None, None, 2)),
        ([NAN, INF, 7.0, 8.0], 3, 0.0, None, (7.0, 30, 1)),
        ([4.0, 5.0, 6.0, 7.0], None, 0.0, None, (4.0, 10, 3)),
    ],
)
def test_a_run_ends_after_so_many_evaluations_without_improvement(
    losses: list[float], patience: int | None, min_delta: float, ended: int | None, improved: tuple[Any, ...]
) -> None:
    found, run = ends_at(losses, patience, min_delta)
    assert found == ended
    assert (run.improved_val_loss, run.improved_step, run.evaluations_since_improved) == improved


def test_the_best_is_the_lowest_though_it_is_no_improvement() -> None:
    _, run = ends_at([4.0, 3.75, 3.8], 9, 0.5)
    assert (run.best_val_loss, run.best_step) == (3.75, 20)
    assert (run.improved_val_loss, run.improved_step, run.evaluations_since_improved) == (4.0, 10, 2)


@pytest.mark.slow  # the import of transformers takes seconds
@pytest.mark.parametrize("patience", [1, 2, 5])
def test_it_ends_where_transformers_callback_ends(patience: int) -> None:
    from transformers.trainer_callback import EarlyStoppingCallback

    def theirs(losses: Sequence[float]) -> int | None:
        callback, control = EarlyStoppingCallback(patience), SimpleNamespace(should_training_stop=False)
        args = SimpleNamespace(greater_is_better=False, metric_for_best_model="eval_loss")
        trainer = SimpleNamespace(best_metric=None)
        for number, loss in enumerate(losses, start=1):
            callback.on_evaluate(args, trainer, control, {"eval_loss": loss})
            if trainer.best_metric is None or loss < trainer.best_metric:  # the Trainer does, after its callbacks
                trainer.best_metric = loss
            if control.should_training_stop:
                return number
        return None

    draw = random.Random(patience)
    runs = [[round(draw.uniform(1, 2) - 0.1 * number, 1) for number in range(12)] for _ in range(300)]
    ends = [ends_at(losses, patience)[0] for losses in runs]
    assert ends == [theirs(losses) for losses in runs]
    assert len(set(ends)) > 5  # of many lengths, and some never


def test_the_reason_says_what_was_waited_for() -> None:
    def reason(losses: Sequence[float], patience: int, min_delta: float = 0.0) -> str | None:
        ended, run = ends_at(losses, patience, min_delta)
        assert ended == len(losses)
        return EarlyStopping(patience, min_delta).reason(run)

    assert reason([4.0, 3.0, 3.5, 3.25], 2, 0.01) == (
        "early stopping at step 40: validation loss has not fallen by more than 0.01 below 3.0000 (step 20)"
        " in 2 evaluations"
    )
    assert reason([4.0, 5.0], 1) == (
        "early stopping at step 20: validation loss has not fallen by more than 0 below 4.0000 (step 10)"
        " in 1 evaluation"
    )
    assert reason([NAN, NAN], 2) == "early stopping at step 20: validation loss was not finite in 2 evaluations"


def test_a_checkpoint_holds_every_number_of_the_state() -> None:
    saved_by_themselves = {"model", "optimizer", "batches", "loss_scale", *ROW_LIMITS}
    assert sorted(COUNTERS) == sorted({field.name for field in fields(State)} - saved_by_themselves)
