"""`tuner export`: of any checkpoint of a run what the run leaves at its end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from tuner.checkpoint.store import newest_whole
from tuner.errors import ConfigError
from tuner.peft.adapter_folder import has_adapter
from tuner.results import facts_of_base, require_free, save_adapter_folder, save_model
from tuner.verbs.merge import write_merged
from tuner.verbs.source import Source, source_of


def export(cfg: DictConfig, overrides: list[str]) -> str:
    """Write `dest`, an adapter folder or a model, and say which.

    Raises:
        TunerError: no such checkpoint or a damaged one, a `dest` that holds something, or no room.
    """
    dest = Path(cfg.dest).expanduser().absolute()
    require_free(dest)
    checkpoint = _checkpoint(cfg)
    settled = cast(DictConfig, OmegaConf.merge(cfg, {"run": None, "checkpoint": str(checkpoint)}))
    source = source_of(settled, overrides)
    model = source.load(quantized=not (cfg.merged and cfg.merge_into == "original"))
    if not has_adapter(model):  # all weights trained, so they are the merged model too
        save_model(model, source.tokenizer, dest)
        said = f"model: {dest}"
    elif cfg.merged:
        said = write_merged(source, model, cfg.merge_into, dest)
    else:
        save_adapter_folder(model, source.tokenizer, dest, facts=_facts(source), run=checkpoint.parents[1])
        said = f"adapter: {dest}"
    return f"checkpoint: {checkpoint}\n{said}"


def _checkpoint(cfg: DictConfig) -> Path:
    """The checkpoint that is named, or the newest whole one of the run that is; damaged ones behind it are named.

    Raises:
        ConfigError: neither or both are named, or the run has none.
        CheckpointError: none of the run's is whole.
    """
    if (cfg.run is None) == (cfg.checkpoint is None):
        raise ConfigError("say checkpoint=DIR, a folder under checkpoints/ of a run, or run=DIR for its newest")
    if cfg.checkpoint is not None:
        return Path(cfg.checkpoint).expanduser().absolute()
    run = Path(cfg.run).expanduser().absolute()
    newest, notes = newest_whole(run)
    if newest is None:
        raise ConfigError(f"run={run}: no checkpoint in it; expected {run}/checkpoints/step-<number>")
    for note in notes:
        print(note, file=sys.stderr)
    return newest


def _facts(source: Source) -> dict[str, Any]:
    """What the run wrote of its base beside its adapter."""
    quantization = cast(dict[str, Any], OmegaConf.to_container(source.settings.quantization))
    return facts_of_base(quantization, source.precision.name)
