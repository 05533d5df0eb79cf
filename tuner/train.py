"""One training run, top to bottom."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from tuner.build import (
    MemoryTechniques,
    build_model,
    build_optimizer,
    count_parameters,
    device_of,
    keys_of,
    load_base,
    require_compiler,
    trainable_dtype,
)
from tuner.checkpoint.base import base_fingerprint
from tuner.checkpoint.continuation import changed_since, decide, origin_of
from tuner.checkpoint.full_disk import full_disk_said
from tuner.checkpoint.lock import only_run_in
from tuner.checkpoint.random_states import seed_all
from tuner.checkpoint.store import CheckpointStore, Restored
from tuner.config import check, freeze
from tuner.data.batches import Batches, batches_by_length
from tuner.data.streamed_batches import StreamedBatches
from tuner.determinism import deterministic
from tuner.errors import Interrupted
from tuner.fit import Parts, fit
from tuner.interruption import interrupted_by_signals, stop_on_signals
from tuner.logging.disk import DiskLogger
from tuner.logging.ending import honest_end, last_words, reason_of
from tuner.logging.header import export_command, header, next_commands, resume_command, saved_in
from tuner.logging.heartbeat import Heartbeat
from tuner.logging.run_log import RunLog
from tuner.logging.terminal import Terminal
from tuner.loss_scale import LossScale
from tuner.measure import record_peak, reset_peak_memory
from tuner.models.decoder import Decoder
from tuner.models.family import as_node, located, stated
from tuner.optimizers.groups import trained
from tuner.out_of_memory import ends_as_out_of_memory
from tuner.precision.resolve import resolve
from tuner.precision.stochastic_rounding import round_updates
from tuner.results import Kept, facts_of_base, finished_before
from tuner.row_limit import RowLimit
from tuner.run_results import RunResults
from tuner.settings import Train
from tuner.types import Dataset, DataSource, Logger, Positioned, Precision, RunInfo, State, Summary
from tuner.verbs.estimate import predicted_mib, settle
from tuner.vocabulary import learning_said, require_embedded, vocabulary_of


def run(cfg: DictConfig, overrides: Sequence[str] | None = None, again: str | None = None) -> Summary:
    """Train as `cfg` says.

    Args:
        cfg: composed; it is frozen and checked here.
        overrides: the words of the command line it was composed from, for the record; None for a call from Python.
        again: the command that goes on with this run, shown where it is stopped; None makes one of the overrides.

    Returns:
        What stands in `summary.json` of the run folder.

    Raises:
        TunerError: an input that is wrong, before anything is written; OutOfMemory, if none was left; Interrupted,
            if asked to stop (it was saved).
    """
    started = time.perf_counter()
    cfg = freeze(cfg)
    check(cfg)  # a typo costs milliseconds, not a model load
    OmegaConf.update(cfg, "model", as_node(stated(instantiate(cfg.model))), merge=False)  # not the preset's shape
    settle(cfg)
    config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    out = Path(cfg.out)
    if decide(out, config, cfg.checkpoint.resume) == "finished":
        return finished_before(out)
    summary = Summary("failed", str(out), resume=again or resume_command(out, config, overrides))
    with (
        only_run_in(out),
        Heartbeat(out, summary),
        ends_as_out_of_memory(),
        honest_end(config, overrides or (), summary, lambda: cast(Logger, instantiate(cfg.logger))),
        deterministic(cfg.train.deterministic, device_of(cfg.device)),
    ):
        train(cfg, config, overrides, summary, started)
    return summary


def train(
    cfg: DictConfig, config: Mapping[str, Any], overrides: Sequence[str] | None, summary: Summary, started: float
) -> None:
    """Make, restore, fit and close; nobody else is in the run folder meanwhile, and `summary` becomes true."""
    out = Path(summary.out)
    if sys.stderr.isatty():
        print("preparing the data and the model ...", file=sys.stderr, flush=True)
    with interrupted_by_signals():
        try:
            with warnings.catch_warnings(record=True) as noted:
                parts = prepare(cfg, out)
            state = parts.state
            restored = parts.checkpoints.restore(state, parts.total_steps)
        finally:
            record_peak(summary, device_of(cfg.device))
    resumed = restored is not None and restored.folder.is_relative_to(out)
    summary.steps, summary.total_steps = state.step, parts.total_steps
    with (
        full_disk_said(out),
        instantiate(cfg.distributed),
        stop_on_signals() as stop,
        Terminal(out) as terminal,
    ):
        log = RunLog(terminal, DiskLogger(out), parts.logger)
        log.start(RunInfo(out, config, overrides or (), described(parts.dataset, state.batches), resumed))
        summary.total_params, summary.trainable_params = count_parameters(state.model)
        summary.precision, summary.trainable_dtype = parts.precision.name, trainable_dtype(state.model)
        summary.device = str(parts.device)
        terminal.header(header(config, summary, described(parts.dataset, state.batches), parts.total_steps))
        for note in [*parts.notes, *(str(warning.message) for warning in noted if warning.category is UserWarning)]:
            terminal.say(note)
        for note in going_on(restored, resumed, config, f"step {state.step} of {parts.total_steps}"):
            terminal.say(note)
        if parts.device.type == "cuda":
            summary.predicted_memory_mib = foretold(cfg, terminal)
        try:
            with parts.checkpoints:
                fit(parts, log, stop, summary, started)
            for problem in parts.checkpoints.problems():
                terminal.say(problem)
            summary.status, summary.resume = "finished", None
        except (Interrupted, KeyboardInterrupt) as error:
            reason = str(error) or "interrupted at once: the steps since the last checkpoint are lost"
            summary.status, summary.reason = "stopped", reason
            terminal.closing(saved_in(out), {"resume": str(summary.resume), **export_command(out, config)})
            raise Interrupted(f"{reason}\nresume: {summary.resume}") from error
        except BaseException as error:
            summary.reason, summary.log_tail = reason_of(error), last_words(out, error)
            raise
        finally:
            summary.seconds = time.perf_counter() - started
            record_peak(summary, parts.device)
            log.close(summary)
        terminal.closing(saved_in(out), next_commands(out, config))


def foretold(cfg: DictConfig, terminal: Terminal) -> float | None:
    """The peak memory of this run as predicted, in MiB; None, with a line that says why, where it cannot be.

    About a second. An optimizer class that a person names may ask numbers of its tensors, which have none here: that is
    no reason not to train.
    """
    try:
        return predicted_mib(cfg)
    except Exception as error:
        terminal.say(f"peak memory was not predicted: {type(error).__name__}: {error}")
        return None


def prepare(cfg: DictConfig, out: Path) -> Parts:
    """Tokenizer, data, model and optimizer: all that can be wrong is found here, before anything is written."""
    reset_peak_memory(device_of(cfg.device))
    seed_all(cfg.seed)
    torch.set_num_threads(cfg.train.num_threads)
    device = device_of(cfg.device)
    memory: MemoryTechniques = instantiate(cfg.memory)
    memory.require(device)
    if cfg.train.compile:
        require_compiler(device)
    precision, fallback = resolve(instantiate(cfg.precision), device)
    model_config = located(instantiate(cfg.model))
    vocabulary = vocabulary_of(model_config, Path(cfg.adapter) if cfg.adapter else None)
    tokenizer = vocabulary.tokenizer
    source: DataSource = instantiate(cfg.data)
    dataset = source.load(tokenizer)
    require_embedded([tokenizer.pad_id, dataset.largest_token], model_config, vocabulary.new_tokens)
    batches = batches_of(source, dataset, cfg, tokenizer.pad_id)
    peft = instantiate(cfg.peft)
    dtype, quantization = getattr(torch, precision.held), instantiate(cfg.quantization)
    base = load_base(model_config, dtype, device, cfg.seed, quantization, vocabulary.new_tokens, peft)
    model = build_model(base, peft, precision, memory)
    if cfg.train.compile:
        model.compile_layers()
    trains = trained(model)
    place = memory.place_of_optimizer([one.param for one in trains])
    with place.there():
        optimizer = build_optimizer(cfg.optimizer, trains, cfg.trust_targets)
    checkpoints = CheckpointStore(
        out, instantiate(cfg.checkpoint), base_of(model), origin_of(cfg.checkpoint.resume, out)
    )
    in_backward = memory.steps_in_backward(optimizer, cfg.train.clip_grad_norm_per_parameter)
    logger: Logger = instantiate(cfg.logger)
    halves = cfg.train.on_oom == "retry"
    state = State(model, optimizer, batches, loss_scale=loss_scale_of(precision))
    state.train_rows, state.val_rows = RowLimit(halves), RowLimit(halves)
    if precision.stochastic_rounding:
        round_updates(state, cfg.seed, "cpu" if memory.offload_optimizer else model.device_type)
    place.step_there(optimizer)  # the rounding too
    total_steps: int = cfg.train.max_steps or cfg.train.epochs * cast(Batches, batches).steps_per_epoch
    results = RunResults(
        out,
        model,
        tokenizer,
        Kept(checkpoints.keys.save_adapter, checkpoints.keys.save_merged),
        facts_of_base(cast(dict[str, Any], OmegaConf.to_container(cfg.quantization)), precision.name),
    )
    one_epoch = isinstance(batches, Batches) and total_steps <= batches.steps_per_epoch
    checkpoints.require_room(state, results.num_bytes(batches, total_steps), one_epoch=one_epoch)
    return Parts(
        Train(**keys_of(cfg.train)),
        device,
        precision,
        tokenizer,
        dataset,
        batches_by_length(dataset.validation, cfg.train.batch_size, tokenizer.pad_id),
        state,
        instantiate(cfg.schedule),
        checkpoints,
        results,
        logger,
        total_steps,
        in_backward,
        [*learning_said(vocabulary, model_config), *([fallback] if fallback else [])],
    )


def loss_scale_of(precision: Precision) -> LossScale | None:
    """What the loss is scaled with at first; None where it is not."""
    if precision.initial_loss_scale is None:
        return None
    return LossScale(float(precision.initial_loss_scale), precision.growth_interval)


def base_of(model: Decoder) -> str | None:
    """Fingerprint of the frozen weights' folder; None where all weights train or they are random."""
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return base_fingerprint(Path(model.config.path)) if frozen and model.config.path else None


def going_on(restored: Restored | None, resumed: bool, config: Mapping[str, Any], where: str) -> list[str]:
    """What is said of a run that does not begin at its first step."""
    if restored is None:
        return []
    if resumed:
        return [*restored.notes, f"resumed at {where}"]
    changed = changed_since(restored.folder.parents[1], config)
    return [*restored.notes, f"begun from {restored.folder} at {where}; changed since: {changed or 'nothing'}"]


def batches_of(source: DataSource, dataset: Dataset, cfg: DictConfig, pad_id: int) -> Batches | StreamedBatches:
    """The training windows, of samples that are there or of a stream."""
    sizes = {"batch_size": cfg.train.batch_size, "accumulation": cfg.train.gradient_accumulation_steps}
    if dataset.stream is not None:
        return StreamedBatches(dataset.stream, pad_id=pad_id, seed=cfg.seed, **sizes)
    order = source.order(dataset, seed=cfg.seed, window=math.prod(sizes.values()))
    return Batches(dataset.train, order, pad_id=pad_id, **sizes)


def described(dataset: Dataset, batches: Positioned) -> dict[str, Any]:
    """What a logger says of the data."""
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "counts": dict(dataset.counts),
        "mean_tokens": round(dataset.mean_tokens, 1),
        **batches.described(),
    }
