"""`tuner validate`: is this a run, and how large?"""

from __future__ import annotations

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from tuner.build import count_from_config


def validate(cfg: DictConfig, overrides: list[str]) -> str:
    """Parameter counts of a configuration that was checked on the way here; no weights, tokenizer or data are read.

    Raises:
        TunerError: a model that cannot be built or adapted as `cfg` says.
    """
    model, quantization, peft = (instantiate(cfg[group]) for group in ("model", "quantization", "peft"))
    total, trainable = count_from_config(model, quantization, peft, Path(cfg.adapter) if cfg.adapter else None)
    return f"total_params: {total}\ntrainable_params: {trainable}"
