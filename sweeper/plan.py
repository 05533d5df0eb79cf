"""From words with commas to trials: expanded, composed, checked, frozen, each once.

Nothing runs before every point is planned, so a typo in the last one costs as little as in the first.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

import tuner
from tuner.errors import ConfigError, IllegalCombination, UnknownKey

ID_CHARACTERS = 10
"""After the letter: of ten thousand points two have the same id once in 20,000 sweeps."""
NO_DIFFERENCE = ("out", "sweep", "estimate", "logger", "trust_targets")
"""Keys and groups of a run that say nothing about what it computes."""

Compose = Callable[[Sequence[str]], DictConfig]


@dataclass(frozen=True)
class Trial:
    """One point of the grid.

    Attributes:
        id: of the configuration: the same point has the same id in every process and every sweep.
        words: what composes it, without Hydra's own.
        values: what each swept word chose, in the order of the words.
        config: composed, not frozen; None for a point that does not compose.
        illegal: why it cannot work, None where it can.
    """

    id: str
    words: Sequence[str]
    values: Mapping[str, str]
    config: DictConfig | None
    illegal: str | None = None

    @property
    def name(self) -> str:
        """`lora_rank=4 optimizer=adamw`."""
        return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.values.items())


def trials_of(words: Sequence[str], loader: ConfigLoader, compose: Compose) -> list[Trial]:
    """The distinct points of a grid, in the order of the words, the last one changing fastest.

    Args:
        words: command-line words without Hydra's own; `a=1,2`, `a=range(1,4)` and `group=glob(*)` are axes.
        loader: finds the options of a glob.
        compose: the words of one point to its configuration, without Hydra's own node.

    Raises:
        ConfigError: every key and value of any point that is wrong in itself, all together. A combination that cannot
            work is a trial with `illegal` set, and so is a point without a key that other points have:
            `peft=lora,full peft.lora_rank=4,8`.
    """
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(words))
    _require_one_meaning(overrides)
    overrides = [override for override in overrides if not override.key_or_group.startswith("sweep.")]
    axes = [_choices(override) for override in overrides]
    swept = [index for index, override in enumerate(overrides) if override.is_sweep_override()]
    trials: dict[str, Trial] = {}
    problems: dict[str, None] = {}
    lacking: list[tuple[Sequence[str], dict[str, str], UnknownKey]] = []
    composed: set[str] = set()
    for point in itertools.product(*axes):
        values = dict(point[index].lstrip("+").split("=", 1) for index in swept)
        try:
            trial = _planned(point, values, compose(point))
        except UnknownKey as error:
            lacking.append((point, values, error))
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
        else:
            trials.setdefault(trial.id, trial)
            composed |= {word.lstrip("+~").partition("=")[0] for word in point}
    for words, values, lack in lacking:
        if lack.key in composed:
            trial = Trial(_digest(sorted(words)), words, values, None, "; ".join(lack.problems))
            trials.setdefault(trial.id, trial)
        else:
            problems |= dict.fromkeys(lack.problems)
    if problems:
        swept_axes = {str(overrides[index].input_line).lstrip("+"): axes[index] for index in swept}
        raise ConfigError(_said_once(problems, swept_axes))
    return list(trials.values())


def _require_one_meaning(overrides: Sequence[Override]) -> None:
    """Refuse an axis that another word replaces, and one over what decides about the sweep itself."""
    keys = [override.get_key_element().lstrip("+") for override in overrides]
    for override, key in zip(overrides, keys, strict=True):
        if override.is_sweep_override() and keys.count(key) > 1:
            raise ConfigError(f"{override.input_line}: another word gives {key} too; say it once")
        if override.is_sweep_override() and key.startswith("sweep."):
            raise ConfigError(f"{override.input_line}: one value for the whole sweep")


def _choices(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{override.input_line}: a grid has no intervals; give values, as key=1,2,3 or range(1,4)")
    key = override.get_key_element()
    choices = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not choices:
        raise ConfigError(f"{override.input_line}: no value to choose from")
    return choices


def _said_once(problems: Iterable[str], axes: Mapping[str, Sequence[str]]) -> list[str]:
    """What is wrong with every value of an axis, as a key that does not exist, as one problem of the whole word.

    Args:
        problems: sentences that begin with the word of a point.
        axes: words as they were given, each with those that it makes of points.
    """
    said = list(problems)
    for line, choices in axes.items():
        words = [choice.lstrip("+") for choice in choices]
        rests = [{one.removeprefix(word) for one in said if one.startswith(f"{word}: ")} for word in words]
        of_all = set.intersection(*rests)
        whole = {f"{word}{rest}": f"{line}{rest}" for word in words for rest in of_all}
        said = [whole.get(one, one) for one in said]
    return list(dict.fromkeys(said))


def _planned(words: Sequence[str], values: Mapping[str, str], config: DictConfig) -> Trial:
    try:
        tuner.check(config)
        illegal = None
    except IllegalCombination as error:
        illegal = "; ".join(error.problems)
    return Trial(identity(config), words, values, config, illegal)


def identity(config: DictConfig) -> str:
    """`t` and the first hexadecimal digits of a digest of everything that decides what a run computes."""
    with_out = OmegaConf.to_container(config, resolve=True)
    assert isinstance(with_out, dict)
    plain: dict[Any, Any] = {key: value for key, value in with_out.items() if key not in NO_DIFFERENCE}
    return _digest(plain)


def _digest(content: Any) -> str:
    # A letter first: 930e005411 is a number to Hydra, YAML and pandas.
    return "t" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:ID_CHARACTERS]


def swept_keys(trials: Iterable[Mapping[str, str]]) -> list[str]:
    """The keys that any of these values name, in the order they are met."""
    return list(dict.fromkeys(key for values in trials for key in values))
