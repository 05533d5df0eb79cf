"""The training loop: tensors and `State`, no configuration."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from tuner.errors import TrainingError
from tuner.loss import sum_cross_entropy
from tuner.loss_scale import LossScale
from tuner.out_of_memory import ends_as_out_of_memory
from tuner.row_limit import RowLimit
from tuner.types import Batch, CausalLM, State, StepsInBackward

MOST_NAMED = 32
"""Samples that a message names; of more it says how many."""


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
        padding_share: of all positions of its batches, those that are padding.
        ends_epoch: whether the window was an epoch's last.
        seconds: what it took.
        skipped: what was not finite, and in which samples, where the gradient was dropped for it; None of a good step.
        loss_scale: what the loss was multiplied with in this step; None where it is not scaled.
    """

    number: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    padding_share: float
    ends_epoch: bool
    seconds: float
    skipped: str | None = None
    loss_scale: float | None = None


def training_steps(
    state: State,
    schedule: Schedule,
    *,
    total_steps: int,
    clip_grad_norm: float | None,
    device: torch.device,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    clip_grad_norm_per_parameter: float | None = None,
    in_backward: StepsInBackward | None = None,
) -> Iterator[Step]:
    """Train until `total_steps`, yielding after each step; `state` is consistent whenever this yields.

    A step that is skipped takes its place among the steps, in the data and in the schedule, and leaves weights and
    optimizer, its counts of steps included, as they were.

    Args:
        state: continued where it stands.
        schedule: of the learning rate.
        total_steps: of the whole run, those already done included.
        clip_grad_norm: largest norm of the gradient; None leaves it.
        device: where batches go.
        on_nonfinite: whether a loss or gradient norm that is not finite ends the run or skips the step. Gradients that
            overflow because of `state.loss_scale` always skip it: that is how the scale is found.
        clip_grad_norm_per_parameter: largest norm of each parameter's gradient; None leaves it.
        in_backward: steps the parameters, clipping included, of windows of one batch; `on_nonfinite` is `stop`, and
            there is no `state.loss_scale`.

    Raises:
        TrainingError: a loss or gradient norm that is not finite; the parameters are as they were before the step, or,
            where they were stepped in backward and the loss was finite, as the message says.
        OutOfMemory: and `state.train_rows` is not to be halved, or cannot be any more; the parameters are as they were,
            unless they were being stepped, as the message says.
    """
    optimizer = state.optimizer
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    base_lrs = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    while state.step < total_steps:
        started = time.perf_counter()
        factor = schedule.factor(state.step, total_steps)
        for group, lr in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = lr * factor
        window = [batch.to(device) for batch in next(state.batches)]
        scale = None if state.loss_scale is None else state.loss_scale.value
        losses, window = gradients_within_memory(state, window, stepped=in_backward is not None)
        loss = float(sum(losses))  # CPU-GPU sync point
        if in_backward is None:
            norm = float(finish_(trained, state.loss_scale, clip_grad_norm, clip_grad_norm_per_parameter))  # likewise
        else:
            norm = float(in_backward.grad_norm())  # likewise
        wrong = judge(state, window, losses, loss, norm, on_nonfinite, stepped=in_backward is not None)
        if wrong is None:
            if in_backward is None:
                with ends_as_out_of_memory(f"step {state.step + 1}, half done: the optimizer's step is not taken back"):
                    optimizer.step()
            state.train_loss = loss
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(batch.num_tokens for batch in window)
        padding = 1 - tokens / sum(batch.tokens.numel() for batch in window)
        seconds = time.perf_counter() - started
        state.step += 1
        state.skipped_steps += wrong is not None
        state.tokens += tokens
        state.seconds += seconds
        lr, ends_epoch = base_lrs[0] * factor, state.batches.at_epoch_end
        yield Step(state.step, loss, norm, lr, tokens, padding, ends_epoch, seconds, wrong, scale)


def gradients_within_memory(
    state: State, window: Sequence[Batch], *, stepped: bool
) -> tuple[list[Tensor], list[Batch]]:
    """`add_gradients` of a window, in batches of as many rows as there is memory for.

    Args:
        state: before the step is counted, without gradients.
        window: what the step trains on.
        stepped: whether backward steps the parameters, so that nothing can be done again.

    Returns:
        The losses and the batches that they are of.

    Raises:
        OutOfMemory: as for `training_steps`.
    """
    scale, step = 1.0 if state.loss_scale is None else state.loss_scale.value, f"step {state.step + 1}"
    if stepped:
        with ends_as_out_of_memory(f"{step}: parameters are stepped in backward, which is not taken back"):
            return add_gradients(state.model, window, scale, only_if_finite=True), list(window)
    return state.train_rows.within(
        lambda batches: add_gradients(state.model, batches, scale),
        window,
        step,
        undo=lambda: state.optimizer.zero_grad(set_to_none=True),
    )


def finish_(
    trained: Sequence[nn.Parameter], loss_scale: LossScale | None, clip_whole: float | None, clip_each: float | None
) -> Tensor:
    """Make the gradients what the optimizer is to see, in place: not scaled any more, and clipped.

    Returns:
        The norm of the whole gradient, before clipping.
    """
    if loss_scale is not None:
        loss_scale.unscale_(trained)
    return clipped(trained, clip_whole, clip_each)


def clipped(trained: Sequence[nn.Parameter], whole: float | None, each: float | None) -> Tensor:
    """Clip gradients in place, each parameter's own and that of all together, to these norms; None leaves them.

    Returns:
        The norm of the whole gradient before.
    """
    if each is None:
        return nn.utils.clip_grad_norm_(trained, whole or math.inf)
    norms = [nn.utils.clip_grad_norm_(p, each) for p in trained if p.grad is not None]
    whole_norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole_norm


def judge(
    state: State,
    window: Sequence[Batch],
    losses: Sequence[Tensor],
    loss: float,
    norm: float,
    on_nonfinite: Literal["stop", "skip"],
    *,
    stepped: bool,
) -> str | None:
    """What is wrong with a step's numbers, so that it is left out; None of a good one. The loss scale learns of it.

    Args:
        state: before the step is counted.
        window: what was trained on.
        losses: of each batch.
        loss, norm: of the whole window.
        on_nonfinite: as for `training_steps`.
        stepped: whether backward stepped the parameters, where the loss was finite.

    Raises:
        TrainingError: they are not finite, and `on_nonfinite` is `stop`.
    """
    scale = state.loss_scale
    if math.isfinite(loss) and math.isfinite(norm):
        if scale is not None:
            scale.count(overflowed=False)
        return None
    if scale is not None and math.isfinite(loss) and scale.can_shrink:
        before = scale.value
        scale.count(overflowed=True)
        return overflow_said(state.step + 1, before, scale)
    done = "stepped in backward" if stepped and math.isfinite(loss) else "not stepped"
    numbers, samples = f"loss {loss}, gradient norm {norm}", named_samples(window, losses)
    wrong = f"step {state.step + 1}: {numbers}: not finite, {done}{samples}"
    if on_nonfinite == "stop":
        raise TrainingError(f"{wrong}; train.on_nonfinite=skip leaves such steps out")
    return wrong


def overflow_said(step: int, scale: float, now: LossScale) -> str:
    """What a person reads of a step whose scaled gradients overflowed."""
    return (
        f"step {step}: gradients overflow float16 with the loss scaled by {scale:g}, not stepped; from here on it is "
        f"scaled by {now.value:g}, as is usual in the first steps"
    )


def backward(model: nn.Module, window: Sequence[Batch]) -> float:
    """Add the gradient of a window's mean loss, and return that loss: the mean a trained token."""
    return float(sum(add_gradients(model, window)))


def add_gradients(
    model: nn.Module, window: Sequence[Batch], scale: float = 1.0, *, only_if_finite: bool = False
) -> list[Tensor]:
    """Add `scale` times the gradient of a window's mean loss, batch by batch.

    Each batch counts by its trained tokens among those of the whole window, so accumulating equals one large batch.

    Args:
        only_if_finite: end at a batch whose loss is not, before its backward pass: a CPU-GPU sync point there.

    Returns:
        Each batch's part of the mean loss a trained token, on the device: reading one is a CPU-GPU sync point.
    """
    lm = cast(CausalLM, model)
    trained = max(sum(batch.num_trained for batch in window), 1)  # nothing to train on: no loss, and no gradient
    losses = []
    for batch in window:
        hidden = lm.hidden(batch.tokens, documents=batch.documents)
        loss = sum_cross_entropy(hidden, batch.labels, lm.lm_head, lm.logit_softcap, scale / trained, lm.device_type)
        losses.append(loss.detach() / scale)
        if only_if_finite and not math.isfinite(losses[-1]):
            break
        loss.backward()  # type: ignore[no-untyped-call]
    return losses


def named_samples(window: Sequence[Batch], losses: Sequence[Tensor]) -> str:
    """The samples of the batches whose own loss is not finite, of all where only the gradient is not, as a clause.

    Args:
        window: what was trained on.
        losses: of each batch up to the first that ended the pass, which is not finite then.
    """
    own = [batch for batch, loss in zip(window, losses, strict=False) if not math.isfinite(loss)]
    ids = sorted({number for batch in own or window for number in batch.sample_ids})
    if not ids:
        return ""
    more = f" and {len(ids) - MOST_NAMED} more" if len(ids) > MOST_NAMED else ""
    return f"; samples {', '.join(map(str, ids[:MOST_NAMED]))}{more}"


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], device: torch.device, rows: RowLimit | None = None) -> float:
    """Mean cross-entropy a trained token over all batches, in nats; the model's mode is left as it was.

    Args:
        model: its mode is that of training or not.
        batches: at least one trained token in all of them.
        device: where they go.
        rows: how many of a batch at once; None is all of them.

    Raises:
        OutOfMemory: and `rows` is not to be halved, or cannot be any more.
    """
    limit = RowLimit() if rows is None else rows
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        sums, _ = limit.within(
            lambda parts: [summed_loss(model, part.to(device)) for part in parts], [batch], "evaluation"
        )
        total += sum(sums)
        tokens += batch.num_trained
    model.train(was_training)
    return total / tokens


def summed_loss(model: nn.Module, batch: Batch) -> float:
    """Cross-entropy of a batch on the model's device, summed over its trained tokens, in nats: a CPU-GPU sync point."""
    lm = cast(CausalLM, model)
    hidden = lm.hidden(batch.tokens, documents=batch.documents)
    return float(sum_cross_entropy(hidden, batch.labels, lm.lm_head, lm.logit_softcap, device_type=lm.device_type))
