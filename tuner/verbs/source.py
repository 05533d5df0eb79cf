"""Which model a verb works on: a run's, an adapter's base with the adapter, or the one that `model` names."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tuner.build import device_of, load_base, tokenizer_of
from tuner.checkpoint.default import load_trainable
from tuner.config import check, compose, freeze
from tuner.errors import ConfigError
from tuner.models.family import located
from tuner.models.llama import Llama, LlamaConfig
from tuner.peft.adapter_folder import load_adapter, read_adapter_config
from tuner.precision.resolve import resolve
from tuner.types import Quantization, Tokenizer

FACTS = "tuner.json"
"""What an adapter's folder says of the base it was trained on."""

FROM_RUN = ("model", "quantization", "precision", "data")
"""Groups that a run folder decides unless the command line does."""


@dataclass(frozen=True)
class Source:
    """A model's parts, settled but not loaded.

    Attributes:
        model: located configuration of the base.
        tokenizer: of the base.
        quantization: what the base is quantized to.
        dtype: of the weights and activations.
        device: where it runs.
        adapter: an adapter folder, or None.
        checkpoint: a checkpoint folder whose trainable weights go on top, or None.
        peft: builds the layers that a checkpoint fills.
        settings: of the run folder where one is given, else of the verb.
    """

    model: LlamaConfig
    tokenizer: Tokenizer
    quantization: Quantization
    dtype: torch.dtype
    device: torch.device
    adapter: Path | None
    checkpoint: Path | None
    peft: Any
    seed: int
    settings: DictConfig

    def load(self, *, quantized: bool = True) -> Llama:
        """The model with its adapter or checkpoint on it, ready to evaluate.

        Args:
            quantized: False leaves the base as it was before quantization.
        """
        model = load_base(self.model, self.dtype, self.device, seed=self.seed)
        if quantized:
            self.quantization.quantize(model)
        if self.adapter is not None:
            load_adapter(model, self.adapter)
        if self.checkpoint is not None:
            self.peft.adapt(model)
            load_trainable(model, self.checkpoint)
        return model.requires_grad_(False).eval()


def source_of(cfg: DictConfig, overrides: Sequence[str]) -> Source:
    """Settle what a verb's `run`, `adapter`, `checkpoint` and `model` mean together.

    Raises:
        ConfigError: more than one of run, adapter and checkpoint, or a folder that is not what it should be.
    """
    given = [key for key in ("run", "adapter", "checkpoint") if cfg[key] is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: give one of them")
    run, adapter, checkpoint = (_folder(cfg[key]) for key in ("run", "adapter", "checkpoint"))
    if checkpoint is not None and not (checkpoint / "trainable.safetensors").is_file():
        raise ConfigError(f"checkpoint={checkpoint}: no checkpoint; expected <run>/checkpoints/step-<number>")
    run_folder = run or (checkpoint.parent.parent if checkpoint else None)
    if run_folder:
        settings = _with_run(cfg, run_folder, overrides)
    else:
        settings = _with_adapter(cfg, adapter, overrides) if adapter else cfg
    model, quantization = instantiate(settings.model), instantiate(settings.quantization)
    if run is not None:
        model, adapter = _results(run, model)
    elif adapter is not None:
        model = model if _said("model", overrides) else _base(adapter, model)
    model = located(model)
    device = device_of(cfg.device)
    precision, fallback = resolve(instantiate(settings.precision), device)
    if fallback:
        print(fallback, file=sys.stderr)
    dtype = getattr(torch, precision.compute)
    peft = instantiate(settings.peft) if checkpoint else None
    seed = settings.seed if run_folder else 0
    return Source(model, tokenizer_of(model), quantization, dtype, device, adapter, checkpoint, peft, seed, settings)


def _folder(given: str | None) -> Path | None:
    return None if given is None else Path(given).expanduser().absolute()


def _said(group: str, overrides: Sequence[str]) -> bool:
    """Whether the command line chooses a group or sets one of its keys."""
    return any(word.lstrip("+~").startswith((f"{group}=", f"{group}.")) for word in overrides)


def _with_run(cfg: DictConfig, run: Path, overrides: Sequence[str]) -> DictConfig:
    """The configuration of a run folder, with the groups that the command line names."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run}: no config.yaml, so this is no run folder")
    frozen = _loaded(file)
    for group in FROM_RUN:
        if group in cfg and _said(group, overrides):
            frozen[group] = OmegaConf.to_container(cfg[group], resolve=True)
    # The folder may be anyone's, and what it names is built: so it is judged by the trust this command line gives and
    # not by its own, and what is judged has no interpolation left that could mean something else afterwards.
    frozen["trust_targets"] = list(cfg.trust_targets)
    frozen = freeze(frozen)
    check(frozen)
    return frozen


def _loaded(file: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(file)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file}: not a configuration: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{file}: not a configuration: expected a mapping of keys")
    return loaded


def _results(run: Path, model: LlamaConfig) -> tuple[LlamaConfig, Path | None]:
    """The base and adapter a run left, or the model it left."""
    if (run / "adapter").is_dir():
        return model, run / "adapter"
    if (run / "model").is_dir():
        return replace(model, path=str(run / "model")), None
    raise ConfigError(
        f"run={run}: neither adapter/ nor model/ in it; an unfinished run has checkpoint={run}/checkpoints/..."
    )


def _base(adapter: Path, model: LlamaConfig) -> LlamaConfig:
    """The base that `adapter_config.json` names."""
    base = read_adapter_config(adapter).get("base_model_name_or_path")
    if base is None or not Path(base).is_dir():
        raise ConfigError(f"adapter={adapter}: its base {base} is no folder here; say model.path=FOLDER or model=NAME")
    return replace(model, path=base)


def _with_adapter(cfg: DictConfig, adapter: Path, overrides: Sequence[str]) -> DictConfig:
    """The verb's configuration with the quantization and the precision of the base that this adapter trained on.

    An adapter made elsewhere does not say them; the command line has the last word.
    """
    file = adapter / FACTS
    if not file.is_file():
        return cfg
    facts = _facts(file)
    frozen = compose([f"{group}={node['name']}" for group, node in facts.items()])
    for group, node in facts.items():
        for key, value in node.items():
            if key != "name":
                OmegaConf.update(frozen, f"{group}.{key}", value, force_add=True)
    check(frozen)  # the file may be anyone's, and what it names is built
    settings = cfg.copy()
    for group in facts:
        if not _said(group, overrides):
            OmegaConf.update(settings, group, frozen[group], merge=False, force_add=True)
    return settings


def _facts(file: Path) -> dict[str, dict[str, Any]]:
    """Name and keys of the groups that `tuner.json` speaks of."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        found = {"quantization": dict(facts["quantization"])}
        if "precision" in facts:
            found["precision"] = {"name": facts["precision"]}
        for group, node in found.items():
            if not isinstance(node["name"], str) or not node["name"].isidentifier():
                raise ValueError(f"{group} {node['name']!r} is no name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: damaged: {type(error).__name__}: {error}") from error
    return found
