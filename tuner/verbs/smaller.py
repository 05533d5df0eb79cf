"""What to change in a run that does not fit, the change that costs least first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from omegaconf import DictConfig, OmegaConf, open_dict

from tuner.config import compose
from tuner.config.composition import check, plain
from tuner.config.rules import WHOLE_WEIGHTS
from tuner.errors import ConfigError
from tuner.estimating.devices import Device
from tuner.types import Change

NUM_CHANGES = 3

Words = tuple[str, ...]


def changes_that_fit(
    cfg: DictConfig,
    total: Callable[[DictConfig], int],
    available: int,
    largest_batch: int | None,
    longest_sequence: int | None,
    device: Device,
) -> list[Change]:
    """Up to three changes after which a run fits, single ones before pairs.

    Args:
        cfg: of the run, frozen.
        total: bytes of a configuration.
        available: bytes.
        largest_batch, longest_sequence: that fit, if any do.
        device: of the run.
    """
    single = list(candidates(cfg, largest_batch, longest_sequence, device))
    found: list[Change] = []
    for words in [*single, *(first + second for first, second in combinations(single, 2))]:
        if len(found) == NUM_CHANGES:
            break
        if not any(set(change.words) <= set(words) for change in found) and (other := changed(cfg, words)) is not None:
            needed = total(other)
            found += [Change(words, needed)] if needed <= available else []
    return found


def candidates(
    cfg: DictConfig, largest_batch: int | None, longest_sequence: int | None, device: Device
) -> Iterator[Words]:
    """Changes in the order of what they cost: nothing but time; precision of the optimizer or of numbers; much time;
    what the run learns."""
    if smaller := smaller_batch(cfg, largest_batch):
        yield smaller
    if cfg.memory.activation_checkpointing in ("none", False):
        yield ("memory.activation_checkpointing=full",)
    if cfg.optimizer._target_ == "tuner.optimizers.adamw.adamw":
        yield ("optimizer=adamw8bit",)
    if cfg.precision._target_.endswith(".fp32") and "bfloat16" in device.dtypes:
        yield ("precision=bf16",)
    if cfg.peft.name in WHOLE_WEIGHTS and not cfg.memory.offload_optimizer and device.kind == "cuda":
        yield ("memory.offload_optimizer=true",)
    if longest_sequence is not None:
        yield (f"data.max_seq_len={longest_sequence}",)
    method = cfg.peft.name
    if method == "lora" and cfg.quantization._target_.endswith(".NoQuantization"):
        yield ("peft=qlora",)
    if method == "full":
        yield ("peft=lora",)
        yield ("peft=qlora",)


def smaller_batch(cfg: DictConfig, largest: int | None) -> Words:
    """The largest batch that fits and divides the rows of a step, with as many more batches a step: the same result."""
    rows, batches = cfg.train.batch_size, cfg.train.gradient_accumulation_steps
    fitting = [size for size in range(1, (largest or 0) + 1) if rows % size == 0 and size < rows]
    if not fitting:
        # With checkpointing or another optimizer beside it, one row may fit where it does not alone.
        fitting = [1] if rows > 1 else []
    if not fitting:
        return ()
    return f"train.batch_size={fitting[-1]}", f"train.gradient_accumulation_steps={batches * rows // fitting[-1]}"


def changed(cfg: DictConfig, words: Sequence[str]) -> DictConfig | None:
    """A copy with `words` said; None where they cannot go together, as a choice that comes twice.

    Of a group that is chosen anew, keys that both members have keep their values.
    """
    keys = [word.partition("=")[0] for word in words]
    if len(set(keys)) < len(keys):
        return None
    other = OmegaConf.create(plain(cfg))
    for word in words:
        key, _, value = word.partition("=")
        if "." in key:
            OmegaConf.update(other, key, type(OmegaConf.select(cfg, key))(value))
        else:
            _choose(other, key, word)
    try:
        check(other)
    except ConfigError:
        return None
    return other


def _choose(cfg: DictConfig, group: str, word: str) -> None:
    """Put a group's member in place, in place; `peft=qlora` chooses the quantization too."""
    composed = compose([word])
    with open_dict(cfg):
        for name in (group, "quantization") if group == "peft" else (group,):
            kept = {key: value for key, value in cfg[name].items() if key in composed[name]}
            fixed = {key: composed[name][key] for key in ("_target_", "_partial_", "name") if key in composed[name]}
            cfg[name] = OmegaConf.merge(composed[name], kept, fixed)
