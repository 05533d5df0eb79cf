"""From the first evaluation to the results: what a run does once everything is made."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, cast

import torch

from tuner.checkpoint.store import CheckpointStore
from tuner.early_stopping import EarlyStopping
from tuner.errors import Interrupted
from tuner.generation import generate_batch
from tuner.interruption import StopRequest
from tuner.logging.disk import Generation
from tuner.logging.run_log import RunLog
from tuner.loop import Schedule, Step, evaluate, training_steps
from tuner.measure import Speed, peak_memory_mib, record_peak
from tuner.models.decoder import Decoder
from tuner.row_limit import RowLimit
from tuner.run_results import RunResults
from tuner.settings import Train
from tuner.types import Batch, Dataset, Logger, Precision, State, StepsInBackward, Summary, Tokenizer


@dataclass(frozen=True)
class Parts:
    """What a configuration is made of for `fit`.

    Attributes:
        train: the keys of `train`.
        validation: its batches.
        total_steps: that the run is to have at its end.
        in_backward: what steps the parameters in backward, where that is asked for.
        notes: lines for a person, of what was found while making the parts.
    """

    train: Train
    device: torch.device
    precision: Precision
    tokenizer: Tokenizer
    dataset: Dataset
    validation: Sequence[Batch]
    state: State
    schedule: Schedule
    checkpoints: CheckpointStore
    results: RunResults
    logger: Logger
    total_steps: int
    in_backward: StepsInBackward | None
    notes: Sequence[str]


def fit(parts: Parts, log: RunLog, stop: StopRequest, summary: Summary, started: float) -> None:
    """Evaluate, train, evaluate, save; `summary` says at any time how far it got.

    Raises:
        Interrupted: a signal asked to stop; the state is saved.
    """
    state, train, results = parts.state, parts.train, parts.results
    early = EarlyStopping(train.early_stopping_patience, train.early_stopping_min_delta)
    if state.step == 0:
        state.val_loss_before = validate(parts, log)
        state.before = write_samples(parts, train.num_samples, train.max_new_tokens)
    summary.val_loss_before = state.val_loss_before
    summary.seconds_to_first_step = time.perf_counter() - started
    if stop.reason is not None and state.step < parts.total_steps:
        stopped(parts, log, None, stop)
    goes_on = state.step < parts.total_steps and early.reason(state) is None
    if goes_on and state.batches.at_epoch_end and results.are_there:
        results.write_epoch(state.batches.epochs_done)  # this was the end of the run, and now more is asked for
    speed = Speed()
    record(summary, state, speed, parts)
    log.terminal.start(parts.total_steps, state.step)
    steps = training_steps(
        state,
        parts.schedule,
        total_steps=parts.total_steps,
        clip_grad_norm=train.clip_grad_norm,
        device=parts.device,
        on_nonfinite=train.on_nonfinite,
        clip_grad_norm_per_parameter=train.clip_grad_norm_per_parameter,
        in_backward=parts.in_backward,
    )
    while early.reason(state) is None and (step := next(steps, None)) is not None:
        last = step.number == parts.total_steps
        speed.add(step.tokens, step.seconds)
        if step.skipped is not None:
            log.terminal.say(f"skipped: {step.skipped}")
        if last or step.skipped is not None or step.number % train.log_every_steps == 0:
            log.log(step.number, metrics(step, speed, state, parts.device))
        val_loss, is_best = None, False
        if last or step.ends_epoch or (train.val_every_steps and step.number % train.val_every_steps == 0):
            summary.val_loss = val_loss = validate(parts, log)
            is_best = early.count(state, val_loss)
        ended = last or early.reason(state) is not None
        record(summary, state, speed, parts)
        if step.ends_epoch and not ended:
            results.write_epoch(state.batches.epochs_done)  # before the checkpoint, which says that it is there
        if stop.reason is not None and not ended:
            stopped(parts, log, val_loss, stop)
        if ended or parts.checkpoints.due(step.number, ends_epoch=step.ends_epoch, is_best=is_best):
            log.flush()
            parts.checkpoints.save(state, val_loss)
        for problem in parts.checkpoints.problems():
            log.terminal.say(problem)
    if summary.val_loss is None:  # an earlier process did the last step and was stopped before its results were saved
        summary.val_loss = validate(parts, log)
    summary.objective = getattr(summary, train.objective)
    log.terminal.stop()
    summary.reason = early.reason(state) if state.step < parts.total_steps else None
    if summary.reason is not None:
        log.terminal.say(summary.reason)
    if parts.dataset.stream is not None:
        counts = parts.dataset.stream.counts.items()
        said = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts if value)
        log.terminal.say(f"read in this process: {said}")
    after = write_samples(parts, len(state.before), train.max_new_tokens)
    log.samples(generations(parts.dataset, state.before, after))
    for folder in results.write():
        log.artifact(folder)


def stopped(parts: Parts, log: RunLog, val_loss: float | None, stop: StopRequest) -> NoReturn:
    """Save, and end the run as one that was asked to stop."""
    log.flush()
    saved = parts.checkpoints.save(parts.state, val_loss, wait=True)
    raise Interrupted(f"stopped by {stop.reason} after step {parts.state.step}, saved in {saved}")


def validate(parts: Parts, log: RunLog) -> float:
    """Validation loss now, logged with its perplexity."""
    loss = evaluate(parts.state.model, parts.validation, parts.device, parts.state.val_rows)
    values = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0))}
    log.log(parts.state.step, {"tokens": float(parts.state.tokens), **values})
    return loss


def write_samples(parts: Parts, number: int, max_new_tokens: int) -> list[str]:
    """What the model replies to the first validation dialogues."""
    tokenizer = parts.tokenizer
    prompts = [
        tokenizer.apply_chat_template(dialogue.messages, add_generation_prompt=True)
        for dialogue in parts.dataset.dialogues[:number]
    ]
    model = cast(Decoder, parts.state.model)
    replies = generate_batch(model, prompts, max_new_tokens=max_new_tokens, end_ids=tokenizer.reply_end_ids)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in replies]


def generations(dataset: Dataset, before: Sequence[str], after: Sequence[str]) -> list[Generation]:
    """Prompt, true reply and the two generations of each sample, side by side."""
    rows = zip(dataset.dialogues, before, after, strict=False)
    return [Generation(one.messages[-1]["content"], one.reply, was, now) for one, was, now in rows]


def metrics(step: Step, speed: Speed, state: State, device: torch.device) -> dict[str, float]:
    """One line of `metrics.jsonl`."""
    scale = {} if step.loss_scale is None else {"train/loss_scale": step.loss_scale}
    rows = {} if state.train_rows.most is None else {"memory/rows_at_once": float(state.train_rows.most)}
    return {
        "tokens": float(state.tokens),
        "train/loss": step.loss,
        "train/lr": step.lr,
        "train/grad_norm": step.grad_norm,
        **scale,
        "perf/tokens_per_s": speed.recent,
        "perf/padding_share": step.padding_share,
        **rows,
        "memory/peak_mib": peak_memory_mib(device),
    }


def record(summary: Summary, state: State, speed: Speed, parts: Parts) -> None:
    """Keep the summary true at every step, whatever ends the run."""
    summary.steps, summary.tokens, summary.train_loss = state.step, state.tokens, state.train_loss
    summary.skipped_steps = state.skipped_steps
    summary.best_val_loss, summary.best_step = state.best_val_loss, state.best_step
    summary.batch_size_used, summary.accumulation_used = used(parts.train, state.train_rows)
    summary.tokens_per_s = speed.mean
    record_peak(summary, parts.device)


def used(train: Train, rows: RowLimit) -> tuple[int, int]:
    """Rows at once and passes a step, of a step's whole window."""
    assert isinstance(train.batch_size, int), "auto was settled before the run began"
    size = min(train.batch_size, rows.most or train.batch_size)
    return size, train.gradient_accumulation_steps * math.ceil(train.batch_size / size)
