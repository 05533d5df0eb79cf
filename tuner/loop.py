"""The training loop: tensors and `State`, no configuration."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import nn

from tuner.errors import TrainingError
from tuner.loss import sum_cross_entropy
from tuner.types import Batch, CausalLM, State


class Schedule(Protocol):
    """A member of the `schedule` group: a pure function of the step."""

    def factor(self, step: int, total_steps: int) -> float:
        """What each group's learning rate is multiplied with at `step`, counted from 0."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    Attributes:
        number: steps done, this one included.
        loss: mean cross-entropy a trained token of the window, in nats.
        grad_norm: of the whole gradient, before clipping.
        lr: learning rate of the first group.
        tokens: of the window, prompts included, padding excluded.
        ends_epoch: whether the window was an epoch's last.
        seconds: what it took.
    """

    number: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    ends_epoch: bool
    seconds: float


def training_steps(
    state: State, schedule: Schedule, *, total_steps: int, clip_grad_norm: float | None, device: torch.device
) -> Iterator[Step]:
    """Train until `total_steps`, yielding after each step; `state` is consistent whenever this yields.

    Args:
        state: continued where it stands.
        schedule: of the learning rate.
        total_steps: of the whole run, those already done included.
        clip_grad_norm: largest norm of the gradient; None leaves it.
        device: where batches go.

    Raises:
        TrainingError: a loss or gradient that is not finite; the parameters are as they were before the step.
    """
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]
    base_lrs = [group.setdefault("initial_lr", group["lr"]) for group in state.optimizer.param_groups]
    while state.step < total_steps:
        started = time.perf_counter()
        factor = schedule.factor(state.step, total_steps)
        for group, lr in zip(state.optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = lr * factor
        window = [batch.to(device) for batch in next(state.batches)]
        loss = backward(state.model, window)
        tokens = sum(batch.num_tokens for batch in window)
        norm = float(nn.utils.clip_grad_norm_(trained, clip_grad_norm or math.inf))  # CPU-GPU sync point
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(f"step {state.step + 1}: loss {loss}, gradient norm {norm}: not finite, not stepped")
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += tokens
        state.train_loss = loss
        seconds = time.perf_counter() - started
        state.seconds += seconds
        yield Step(state.step, loss, norm, base_lrs[0] * factor, tokens, state.batches.at_epoch_end, seconds)


def backward(model: nn.Module, window: Sequence[Batch]) -> float:
    """Add the gradient of a window's mean loss, batch by batch.

    Each batch counts by its trained tokens among those of the whole window, so accumulating equals one large batch.

    Returns:
        The mean loss a trained token.
    """
    lm = cast(CausalLM, model)
    trained = max(sum(batch.num_trained for batch in window), 1)  # nothing to train on: no loss, and no gradient
    total = torch.zeros((), device=window[0].tokens.device)
    for batch in window:
        loss = sum_cross_entropy(lm.hidden(batch.tokens), batch.labels, lm.lm_head) / trained
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return float(total)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> float:
    """Mean cross-entropy a trained token over all batches, in nats; the model's mode is left as it was."""
    lm = cast(CausalLM, model)
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        moved = batch.to(device)
        total += float(sum_cross_entropy(lm.hidden(moved.tokens), moved.labels, lm.lm_head))
        tokens += batch.num_trained
    model.train(was_training)
    return total / tokens
