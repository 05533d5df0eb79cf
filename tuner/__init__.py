"""Fine-tune open-weight language models in native PyTorch by composing choices; see the README.

The functions here are the public API. Each imports what it needs when it is called, so `import tuner` costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig
    from torch import nn

    from tuner.types import MemoryEstimate, Summary, Tokenizer

__all__ = ["check", "compose", "estimate", "freeze", "load_model", "load_tokenizer", "run"]


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of a run from command-line words: `compose(["peft=qlora", "optimizer.lr=1e-4"])`.

    Raises:
        ConfigError: a group, option or key that does not exist, or a word that cannot be parsed.
    """
    from tuner.config import compose

    return compose(overrides)


def check(cfg: DictConfig | Mapping[str, Any]) -> None:
    """Check every key and every rule between groups, in milliseconds and without torch.

    Raises:
        ConfigError: all problems together, each naming the key, the value and the valid choices; IllegalCombination if
            all of them are rules between values that are right in themselves.
    """
    from tuner.config import check

    check(cfg)


def freeze(cfg: DictConfig) -> DictConfig:
    """A resolved copy that means the same in any process and any folder: paths, threads and tracking store settled.

    With a `model.source` or `data.source` its `revision` becomes a commit, for which the hub is asked.

    Raises:
        TunerError: the hub cannot be reached or does not give it.
    """
    from tuner.config import freeze

    return freeze(cfg)


def run(cfg: DictConfig, overrides: Sequence[str] | None = None, again: str | None = None) -> Summary:
    """Train as `cfg` says; what is left on disk is in the folder `summary.out`.

    Args:
        cfg: composed or frozen.
        overrides: the words of the command line it was composed from, for the record.
        again: the command that goes on with this run, shown where it is stopped; None makes one of the overrides.

    Raises:
        TunerError: an input that is wrong: the configuration, the data, the model's files, a checkpoint.
    """
    from tuner.train import run

    return run(cfg, overrides, again)


def estimate(cfg: DictConfig) -> MemoryEstimate:
    """The peak memory that a run takes on `cfg.estimate.device`, predicted; no weights, data or GPU are needed.

    Args:
        cfg: composed or frozen.

    Raises:
        TunerError: the configuration is wrong, the device is not in the table, or the shape of the model is not known.
    """
    from tuner.verbs.estimate import estimated

    return estimated(cfg)


def load_model(
    folder: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu", adapter: str | Path | None = None
) -> nn.Module:
    """The model of a Hugging Face folder: `model(tokens [B, T]) -> logits [B, T, V]`.

    Args:
        folder: config.json and safetensors of a supported family.
        dtype: of its weights.
        device: where they are.
        adapter: a PEFT adapter folder to put on it.

    Raises:
        ModelError: a folder that is not supported, incomplete or damaged.
    """
    from tuner.build import load_model

    return load_model(folder, dtype=dtype, device=device, adapter=adapter)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Raises:
        ModelError: a folder without tokenizer files.
    """
    from tuner.tokenizers import load_tokenizer

    return load_tokenizer(folder)
