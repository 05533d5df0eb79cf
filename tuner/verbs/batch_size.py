"""`train.batch_size=auto`: as many rows at once as fit, a step's rows staying what they are."""

from __future__ import annotations

from dataclasses import replace

from omegaconf import DictConfig

from tuner.errors import ConfigError
from tuner.estimating.devices import MIB, Device
from tuner.estimating.predicting import Predictor
from tuner.estimating.shapes import Plan

SHARE = 0.9
"""Of what a device has, what is filled: the rest is for memory that the allocator holds in pieces too small to use."""


def settle_batch_size(cfg: DictConfig, plan: Plan, name: str, device: Device) -> None:
    """Write down the batch size that `auto` means, and how many batches then are a step, in place.

    Args:
        cfg: frozen; `train.gradient_accumulation_steps` is the rows of a step.
        plan: of it, of any batch.
        name: of the device, for a message.
        device: that the run has.

    Raises:
        ConfigError: not even one row fits.
    """
    of_step = cfg.train.gradient_accumulation_steps
    available = device.memory_bytes - device.reserved_bytes
    for rows in (rows for rows in range(of_step, 0, -1) if of_step % rows == 0):
        needed = Predictor(replace(plan, rows=rows, accumulates=rows < of_step), device).peak().total
        if needed <= SHARE * available:
            cfg.train.batch_size, cfg.train.gradient_accumulation_steps = rows, of_step // rows
            return
    raise ConfigError(
        f"train.batch_size=auto: not even one row of {plan.tokens} tokens fits on {name}: {needed / MIB:,.0f} MiB, and "
        f"{SHARE:.0%} of {available / MIB:,.0f} may be filled; tuner estimate with train.batch_size=1 says what would"
    )
