"""`tuner estimate`: how much memory will a run take, and does it fit?"""

from __future__ import annotations

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from tuner.build import MemoryTechniques, build_optimizer, device_of
from tuner.config import check, freeze
from tuner.estimating.counting import PAGED
from tuner.estimating.devices import CPU, Device, deterministic, device_named, of_machine
from tuner.estimating.predicting import Peak, Predictor
from tuner.estimating.searching import largest
from tuner.estimating.shapes import Plan
from tuner.models.family import stated
from tuner.optimizers.groups import trained
from tuner.peft.last_layers import LastLayers
from tuner.precision.resolve import in_fp32
from tuner.types import MemoryEstimate, Precision
from tuner.verbs.batch_size import settle_batch_size
from tuner.verbs.smaller import changes_that_fit
from tuner.vocabulary import expected_tokens, rows_brought

MIB = 2**20
AUTO = "auto"
SEQUENCE_STEP = 64
"""The longest sequence is sought among multiples of this."""

COMPONENTS = (
    "frozen_weights",
    "quantization_scales",
    "trainable_weights",
    "gradients",
    "optimizer_state",
    "activations",
    "logits",
    "temporary",
    PAGED,
)
PHASES = {
    "before": "before the first pass",
    "first step": "the first optimizer step",
    "forward": "forward pass",
    "loss": "loss",
    "backward": "backward pass",
    "step": "optimizer step",
}
"""What the parts of a step are called."""


def estimate(cfg: DictConfig, overrides: list[str]) -> str:
    """The prediction as text.

    Raises:
        TunerError: as `tuner.estimate`.
    """
    return "\n".join(said(estimated(cfg), cfg))


def estimated(cfg: DictConfig) -> MemoryEstimate:
    """See `tuner.estimate`."""
    cfg = freeze(cfg, pins=False)
    check(cfg)
    name, device = device_for(cfg)
    if cfg.train.batch_size == AUTO:
        settle_batch_size(cfg, plan_of(cfg, device), name, device)
    available = device.memory_bytes - device.reserved_bytes
    predictor = Predictor(plan_of(cfg, device), device)
    peak, plan = predictor.peak(), predictor.plan

    def total(other: DictConfig) -> int:
        return Predictor(plan_of(other, device), device).peak().total

    rows = largest(lambda rows: predictor.peak(rows=rows).total, available, plan.rows, 1, 2**16)
    longest = max(plan.model.max_position_embeddings, plan.tokens)
    tokens = largest(lambda tokens: predictor.peak(tokens=tokens).total, available, plan.tokens, SEQUENCE_STEP, longest)
    changes = () if peak.total <= available else changes_that_fit(cfg, total, available, rows, tokens, device)
    return MemoryEstimate(name, cfg.train.batch_size, components_of(peak), when(peak), available, rows, tokens, changes)


def predicted_mib(cfg: DictConfig) -> float:
    """The peak alone, in MiB, of a frozen and checked configuration where it would run."""
    _, device = device_here(cfg)
    return Predictor(plan_of(cfg, device), device).peak().total / MIB


def settle(cfg: DictConfig) -> None:
    """Write down what `train.batch_size=auto` is where a frozen and checked configuration would run, in place.

    Raises:
        ConfigError: not even one row fits.
    """
    if cfg.train.batch_size == AUTO:
        name, device = device_here(cfg)
        settle_batch_size(cfg, plan_of(cfg, device), name, device)


def device_for(cfg: DictConfig) -> tuple[str, Device]:
    """Name and facts of the device that `cfg` asks about.

    Raises:
        ConfigError: it is not in the table.
    """
    if cfg.estimate.device is None:
        return device_here(cfg)
    return cfg.estimate.device, _as_run(device_named(cfg.estimate.device), cfg)


def device_here(cfg: DictConfig) -> tuple[str, Device]:
    """Name and facts of the device that a run would have.

    Raises:
        ConfigError: `device=cuda` where there is none.
    """
    device = device_of(cfg.device)
    if device.type == "cpu":
        return CPU, device_named(CPU)
    return torch.cuda.get_device_name(device), _as_run(of_machine(device), cfg)


def _as_run(device: Device, cfg: DictConfig) -> Device:
    return deterministic(device) if cfg.train.deterministic else device


def plan_of(cfg: DictConfig, device: Device) -> Plan:
    """What of a frozen configuration decides how much memory a step takes on a device.

    Raises:
        TunerError: the shape of the model is not known, its parts do not fit together, or a run would be refused there.
    """
    model = stated(instantiate(cfg.model))
    packs = cfg.data.packing == "pack"
    precision: Precision = instantiate(cfg.precision)
    memory: MemoryTechniques = instantiate(cfg.memory)
    memory.require(torch.device(device.kind))
    peft = instantiate(cfg.peft)
    return Plan(
        model=model,
        new_tokens=rows_brought(Path(cfg.adapter), model) if cfg.adapter else expected_tokens(model),
        quantization=instantiate(cfg.quantization),
        peft=peft,
        precision=precision if precision.compute in device.dtypes else in_fp32(precision),
        memory=instantiate(cfg.memory, activation_offloading=False),  # which is done on paper
        offloads_activations=memory.activation_offloading,
        make_optimizer=lambda model: build_optimizer(cfg.optimizer, trained(model), cfg.trust_targets),
        rows=1 if cfg.train.batch_size == AUTO else cfg.train.batch_size,
        tokens=cfg.data.pack_len if packs and cfg.data.pack_len else cfg.data.max_seq_len,
        document_tokens=cfg.data.max_seq_len if packs else None,
        accumulates=cfg.train.gradient_accumulation_steps > 1,
        may_be_cut=cfg.adapter is None,
        clip_grad_norm=cfg.train.clip_grad_norm,
        last_apart=peft.num_layers if isinstance(peft, LastLayers) else 0,
    )


def components_of(peak: Peak) -> dict[str, int]:
    """Bytes by component, all of `COMPONENTS` in their order."""
    return {kind: peak.by_kind.get(kind, 0) for kind in COMPONENTS if kind in peak.by_kind or kind != PAGED}


def when(peak: Peak) -> str:
    """The part of a step in words: `backward pass, last layer`."""
    phase, *rest = peak.region
    place = [part for part in rest if not part.isdigit()]
    if "layer" in place:
        index = int(rest[-1])
        behind = "from the last" in place
        place = [f"layer {index + 1}"] if not behind else [f"layer {index + 1} from the end" if index else "last layer"]
    return ", ".join([PHASES[phase], *place])


def said(found: MemoryEstimate, cfg: DictConfig) -> list[str]:
    """Lines for a person."""
    rows = {name.replace("_", " "): size for name, size in found.components.items() if name != PAGED}
    sizes = {**rows, "peak": found.peak_bytes, "there is": found.available_bytes}
    width = max(map(len, sizes))
    lines = [f"{found.device}, MiB alive at the peak of a step ({found.when}):"]
    lines += [f"  {name.ljust(width)}  {size / MIB:12,.1f}" for name, size in sizes.items()]
    if paged := found.components.get(PAGED):
        lines.append(f"beside them {paged / MIB:,.1f} MiB of optimizer state that is moved out when the GPU runs short")
    batch, length = found.batch_size, cfg.data.max_seq_len
    lines.append("it fits" if found.fits else "it does not fit")
    lines.append(f"with data.max_seq_len={length}: " + _at_most("train.batch_size", found.largest_batch))
    lines.append(f"with train.batch_size={batch}: " + _at_most("data.max_seq_len", found.longest_sequence))
    if not found.fits:
        lines.append(
            "what would make it fit, the cheapest first:" if found.changes else "no one or two changes make it fit"
        )
    lines += [f"  {' '.join(change.words)}: {change.peak_bytes / MIB:,.1f} MiB" for change in found.changes]
    return lines


def _at_most(key: str, value: int | None) -> str:
    return f"no {key} fits" if value is None else f"up to {key}={value}"
