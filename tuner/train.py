"""One training run, top to bottom."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tuner.build import (
    build_model,
    count_parameters,
    device_of,
    load_base,
    require_compiler,
    require_embedded,
    tokenizer_of,
    trainable_dtype,
)
from tuner.checkpoint.continuation import decide
from tuner.checkpoint.default import Checkpoints
from tuner.checkpoint.full_disk import full_disk_said
from tuner.checkpoint.lock import only_run_in
from tuner.config import check, freeze
from tuner.data.batches import Batches, batches_by_length
from tuner.errors import Interrupted
from tuner.generation import generate_batch
from tuner.interruption import StopRequest, stop_on_signals
from tuner.logging.disk import DiskLogger, Generation
from tuner.logging.header import header, next_commands, resume_command, saved_in
from tuner.logging.run_log import RunLog
from tuner.logging.terminal import Terminal
from tuner.loop import Schedule, Step, evaluate, training_steps
from tuner.measure import Speed, peak_memory_mib, reset_peak_memory
from tuner.models.family import located
from tuner.models.llama import Llama
from tuner.optimizers.custom import custom
from tuner.precision.resolve import resolve
from tuner.results import finished_before, results_bytes, save_results
from tuner.types import Batch, Dataset, Logger, Precision, RunInfo, State, Summary, Tokenizer


@dataclass(frozen=True)
class Parts:
    """What `prepare` makes of a configuration and `fit` trains."""

    device: torch.device
    precision: Precision
    tokenizer: Tokenizer
    dataset: Dataset
    validation: Sequence[Batch]
    state: State
    schedule: Schedule
    checkpoints: Checkpoints
    logger: Logger
    total_steps: int
    notes: Sequence[str]


def run(cfg: DictConfig, overrides: Sequence[str] | None = None, again: str | None = None) -> Summary:
    """Train as `cfg` says.

    Args:
        cfg: composed; it is frozen and checked here.
        overrides: the words of the command line it was composed from, for the record; None for a call from Python.
        again: the command that goes on with this run, shown where it is stopped; None makes one of the overrides.

    Returns:
        What stands in `summary.json` of the run folder.

    Raises:
        TunerError: an input that is wrong, before anything is written; Interrupted, if asked to stop (it was saved).
    """
    started = time.perf_counter()
    cfg = freeze(cfg)
    check(cfg)  # a typo costs milliseconds, not a model load
    config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    out = Path(cfg.out)
    if decide(out, config, cfg.checkpoint.resume) == "finished":
        return finished_before(out)
    with only_run_in(out):
        return train(cfg, config, out, overrides, again or resume_command(out, config, overrides), started)


def train(
    cfg: DictConfig, config: Mapping[str, Any], out: Path, overrides: Sequence[str] | None, resume: str, started: float
) -> Summary:
    """Make, restore, fit and close; nobody else is in `out` meanwhile."""
    if sys.stderr.isatty():
        print("preparing the data and the model ...", file=sys.stderr, flush=True)
    with warnings.catch_warnings(record=True) as noted:
        parts = prepare(cfg, out)
    state = parts.state
    resumed = parts.checkpoints.restore(out, state, parts.total_steps)
    with (
        full_disk_said(out),
        instantiate(cfg.distributed),
        stop_on_signals() as stop,
        Terminal(out) as terminal,
    ):
        log = RunLog(terminal, DiskLogger(out), parts.logger)
        log.start(RunInfo(out, config, overrides or (), described(parts.dataset), resumed))
        total, trainable = count_parameters(state.model)
        summary = Summary("failed", str(out), total_params=total, trainable_params=trainable)
        summary.precision, summary.trainable_dtype = parts.precision.name, trainable_dtype(state.model)
        summary.device = str(parts.device)
        terminal.header(header(config, summary, described(parts.dataset), parts.total_steps))
        for note in [*parts.notes, *(str(warning.message) for warning in noted if warning.category is UserWarning)]:
            terminal.say(note)
        if resumed:
            terminal.say(f"resumed at step {state.step} of {parts.total_steps}")
        try:
            fit(parts, cfg, log, stop, summary, started)
            summary.status = "finished"
        except (Interrupted, KeyboardInterrupt) as error:
            reason = str(error) or "interrupted at once: the steps since the last checkpoint are lost"
            summary.status, summary.reason = "stopped", reason
            terminal.closing(saved_in(out), {"resume": resume})
            raise Interrupted(f"{reason}\nresume: {resume}") from error
        except BaseException as error:
            summary.reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            summary.seconds = time.perf_counter() - started
            log.close(summary)
        terminal.closing(saved_in(out), next_commands(out, config))
    return summary


def prepare(cfg: DictConfig, out: Path) -> Parts:
    """Tokenizer, data, model and optimizer: all that can be wrong is found here, before anything is written."""
    reset_peak_memory(device_of(cfg.device))
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.train.num_threads)
    device = device_of(cfg.device)
    if cfg.train.compile:
        require_compiler(device)
    precision, fallback = resolve(instantiate(cfg.precision), device)
    model_config = located(instantiate(cfg.model))
    tokenizer = tokenizer_of(model_config)
    dataset: Dataset = instantiate(cfg.data).load(tokenizer)
    samples = [*dataset.train, *dataset.validation]
    require_embedded([tokenizer.pad_id, *(max(sample.tokens) for sample in samples)], model_config)
    batches = Batches(
        dataset.train,
        batch_size=cfg.train.batch_size,
        accumulation=cfg.train.gradient_accumulation_steps,
        pad_id=tokenizer.pad_id,
        seed=cfg.seed,
        fingerprint=dataset.fingerprint,
    )
    model = build_model(
        load_base(model_config, getattr(torch, precision.compute), device, cfg.seed),
        instantiate(cfg.quantization),
        instantiate(cfg.peft),
        precision,
        instantiate(cfg.memory),
    )
    if cfg.train.compile:
        model.compile_layers()
    optimizer = build_optimizer(cfg.optimizer, [p for p in model.parameters() if p.requires_grad], cfg.trust_targets)
    checkpoints: Checkpoints = instantiate(cfg.checkpoint)
    logger: Logger = instantiate(cfg.logger)
    state = State(model, optimizer, batches)
    checkpoints.require_room(out, state, results_bytes(model))
    return Parts(
        device,
        precision,
        tokenizer,
        dataset,
        batches_by_length(dataset.validation, cfg.train.batch_size, tokenizer.pad_id),
        state,
        instantiate(cfg.schedule),
        checkpoints,
        logger,
        cfg.train.max_steps or cfg.train.epochs * batches.steps_per_epoch,
        [fallback] if fallback else [],
    )


def build_optimizer(node: DictConfig, params: list[nn.Parameter], trusted: Sequence[str]) -> torch.optim.Optimizer:
    """One of our optimizer functions, or a library's class that `optimizer._target_` names."""
    if node._target_.startswith("tuner."):
        return cast(torch.optim.Optimizer, instantiate(node)(params))
    return custom(node._target_, params, keys_of(node), trusted)


def keys_of(node: DictConfig) -> dict[str, Any]:
    """The keys of a group's member as plain containers, without `_target_` and its like."""
    plain = cast(dict[str, Any], OmegaConf.to_container(node))
    return {key: value for key, value in plain.items() if not key.startswith("_")}


def fit(parts: Parts, cfg: DictConfig, log: RunLog, stop: StopRequest, summary: Summary, started: float) -> None:
    """Evaluate, train, evaluate, save; `summary` says at any time how far it got.

    Raises:
        Interrupted: a signal asked to stop; the state is saved.
    """
    state, train = parts.state, cfg.train
    if state.step == 0:
        state.val_loss_before = validate(parts, log)
        state.before = write_samples(parts, train.num_samples, train.max_new_tokens)
    summary.val_loss_before = state.val_loss_before
    summary.seconds_to_first_step = time.perf_counter() - started
    if stop.reason is not None and state.step < parts.total_steps:
        stopped(parts, summary, stop)
    speed = Speed()
    record(summary, state, speed, parts.device)
    log.terminal.start(parts.total_steps, state.step)
    for step in training_steps(
        state, parts.schedule, total_steps=parts.total_steps, clip_grad_norm=train.clip_grad_norm, device=parts.device
    ):
        last = step.number == parts.total_steps
        speed.add(step.tokens, step.seconds)
        if last or step.number % train.log_every_steps == 0:
            log.log(step.number, metrics(step, speed, state.tokens, parts.device))
        if last or step.ends_epoch or (train.val_every_steps and step.number % train.val_every_steps == 0):
            summary.val_loss = validate(parts, log)
        record(summary, state, speed, parts.device)
        if stop.reason is not None and not last:
            stopped(parts, summary, stop)
        if last or parts.checkpoints.due(step.number):
            parts.checkpoints.save(Path(summary.out), state)
    if summary.val_loss is None:  # an earlier process did the last step and was stopped before its results were saved
        summary.val_loss = validate(parts, log)
    summary.objective = getattr(summary, train.objective)
    log.terminal.stop()
    after = write_samples(parts, len(state.before), train.max_new_tokens)
    log.samples(generations(parts.dataset, state.before, after))
    quantization = {"name": cfg.quantization._target_.split(".")[-2], **keys_of(cfg.quantization)}
    facts = {"quantization": quantization, "precision": parts.precision.name}
    for folder in save_results(state.model, parts.tokenizer, Path(summary.out), facts=facts):
        log.artifact(folder)


def stopped(parts: Parts, summary: Summary, stop: StopRequest) -> NoReturn:
    """Save, and end the run as one that was asked to stop."""
    saved = parts.checkpoints.save(Path(summary.out), parts.state)
    raise Interrupted(f"stopped by {stop.reason} after step {parts.state.step}, saved in {saved}")


def validate(parts: Parts, log: RunLog) -> float:
    """Validation loss now, logged with its perplexity."""
    loss = evaluate(parts.state.model, parts.validation, parts.device)
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
    model = cast(Llama, parts.state.model)
    replies = generate_batch(model, prompts, max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_id)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in replies]


def generations(dataset: Dataset, before: Sequence[str], after: Sequence[str]) -> list[Generation]:
    """Prompt, true reply and the two generations of each sample, side by side."""
    rows = zip(dataset.dialogues, before, after, strict=False)
    return [Generation(one.messages[-1]["content"], one.reply, was, now) for one, was, now in rows]


def metrics(step: Step, speed: Speed, tokens: int, device: torch.device) -> dict[str, float]:
    """One line of `metrics.jsonl`."""
    return {
        "tokens": float(tokens),
        "train/loss": step.loss,
        "train/lr": step.lr,
        "train/grad_norm": step.grad_norm,
        "perf/tokens_per_s": speed.recent,
        "memory/peak_mib": peak_memory_mib(device),
    }


def record(summary: Summary, state: State, speed: Speed, device: torch.device) -> None:
    """Keep the summary true at every step, whatever ends the run."""
    summary.steps, summary.tokens, summary.train_loss = state.step, state.tokens, state.train_loss
    summary.tokens_per_s, summary.peak_memory_mib = speed.mean, peak_memory_mib(device)


def described(dataset: Dataset) -> dict[str, Any]:
    """What a logger says of the data."""
    lengths = [len(sample.tokens) for sample in dataset.train]
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "counts": dict(dataset.counts),
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
    }
