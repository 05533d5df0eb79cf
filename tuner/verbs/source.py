"""Which model a verb works on: a run's, an adapter's base with the adapter, or the one that `model` names."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tuner.build import UNQUANTIZED, cast_trainable, compute_in, device_of, load_base
from tuner.checkpoint.folder import WEIGHTS, read_weights
from tuner.checkpoint.snapshot import put_weights
from tuner.checkpoint.store import whole_or_refused
from tuner.config import check, chooses_model, freeze, is_said, with_base_of_adapter
from tuner.errors import ConfigError
from tuner.models.config import ModelConfig
from tuner.models.decoder import Decoder
from tuner.models.family import located
from tuner.peft.adapter_folder import load_adapter
from tuner.peft.residual_folder import Residuals
from tuner.precision.resolve import resolve
from tuner.types import Precision, Quantization, Tokenizer
from tuner.vocabulary import Vocabulary, require_embedded, vocabulary_of

FROM_RUN = ("model", "quantization", "precision", "data")
"""Groups that a run folder decides unless the command line does."""


@dataclass(frozen=True)
class Source:
    """A model's parts, settled but not loaded.

    Attributes:
        model: located configuration of the base.
        vocabulary: its tokenizer, and the tokens that it has more than the base.
        quantization: what the base is quantized to.
        precision: what is computed in, on this device.
        device: where it runs.
        adapter: an adapter folder, or None.
        checkpoint: a checkpoint folder whose trainable weights go on top, or None.
        peft: builds the layers that a checkpoint fills.
        settings: of the run folder where one is given, else of the verb.
    """

    model: ModelConfig
    vocabulary: Vocabulary
    quantization: Quantization
    precision: Precision
    device: torch.device
    adapter: Path | None
    checkpoint: Path | None
    peft: Any
    seed: int
    settings: DictConfig

    @property
    def tokenizer(self) -> Tokenizer:
        return self.vocabulary.tokenizer

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = getattr(torch, self.precision.held)
        return dtype

    def require_embedded(self, ids: Iterable[int]) -> None:
        """Refuse tokens that the model has no embedding of.

        Raises:
            ModelError: naming the largest.
        """
        require_embedded(ids, self.model, self.vocabulary.new_tokens)

    def load(self, *, quantized: bool = True) -> Decoder:
        """The model with its adapter or checkpoint on it, ready to evaluate.

        Args:
            quantized: False leaves the base as it was before quantization.
        """
        quantization = self.quantization if quantized else UNQUANTIZED
        new_tokens = self.vocabulary.new_tokens
        changing = self.peft if self.adapter is None else Residuals(self.adapter)
        model = load_base(self.model, self.dtype, self.device, self.seed, quantization, new_tokens, changing)
        if self.adapter is not None:
            load_adapter(model, self.adapter)
        if self.checkpoint is not None:
            self.peft.adapt(model)
            cast_trainable(model, self.precision)
            put_weights(read_weights(whole_or_refused(self.checkpoint)), model, self.checkpoint)
        compute_in(model, self.precision)
        return model.requires_grad_(False).eval()


def source_of(cfg: DictConfig, overrides: Sequence[str]) -> Source:
    """Settle what a verb's `run`, `adapter`, `checkpoint` and `model` mean together.

    Raises:
        ConfigError: more than one of run, adapter and checkpoint, or a folder that is not what it should be.
    """
    given = [key for key in ("run", "adapter", "checkpoint") if cfg.get(key) is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: give one of them")
    run, adapter, checkpoint = (_folder(cfg.get(key)) for key in ("run", "adapter", "checkpoint"))
    if checkpoint is not None and not (checkpoint / WEIGHTS).is_file():
        raise ConfigError(f"checkpoint={checkpoint}: no checkpoint; expected <run>/checkpoints/step-<number>")
    run_folder = run or (checkpoint.parent.parent if checkpoint else None)
    if run_folder:
        settings = _with_run(cfg, run_folder, overrides)
    else:
        settings = with_base_of_adapter(str(adapter), cfg, overrides) if adapter else cfg
    model, quantization = instantiate(settings.model), instantiate(settings.quantization)
    if run is not None:
        if not is_said("model.chat_template", overrides):
            model = replace(model, chat_template=None)  # the one it was trained with is among its results
        model, adapter = _results(run, model)
        if adapter is None and not is_said("quantization", overrides):
            quantization = UNQUANTIZED  # a merged model is not the base that was quantized
        if is_said("model.add_tokens", overrides):
            raise ConfigError(f"model.add_tokens=... run={run}: the run has the tokens it learnt; leave it out")
    model = located(model)
    device = device_of(cfg.device)
    precision, fallback = resolve(instantiate(settings.precision), device)
    if fallback:
        print(fallback, file=sys.stderr)
    peft = instantiate(settings.peft) if checkpoint else None
    seed = settings.seed if run_folder else 0
    begun = adapter or (Path(settings.adapter) if checkpoint and settings.adapter else None)  # where tokens are from
    vocabulary = vocabulary_of(model, begun)
    return Source(model, vocabulary, quantization, precision, device, adapter, checkpoint, peft, seed, settings)


def _folder(given: str | None) -> Path | None:
    return None if given is None else Path(given).expanduser().absolute()


def _with_run(cfg: DictConfig, run: Path, overrides: Sequence[str]) -> DictConfig:
    """The configuration of a run folder, with the groups that the command line names."""
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run}: no config.yaml, so this is no run folder")
    frozen = _loaded(file)
    for group in FROM_RUN:
        chosen = chooses_model(overrides) if group == "model" else is_said(group, overrides)
        if group in cfg and chosen:
            frozen[group] = OmegaConf.to_container(cfg[group], resolve=True)
    if is_said("model.chat_template", overrides):
        frozen.model.chat_template = cfg.model.chat_template
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


def _results(run: Path, model: ModelConfig) -> tuple[ModelConfig, Path | None]:
    """The base and adapter a run left, or the model it left."""
    if (run / "adapter").is_dir():
        return model, run / "adapter"
    if (run / "model").is_dir():
        return replace(model, path=str(run / "model"), source=None, revision=None, add_tokens=[]), None
    raise ConfigError(
        f"run={run}: neither adapter/ nor model/ in it; an unfinished run has checkpoint={run}/checkpoints/..."
    )
