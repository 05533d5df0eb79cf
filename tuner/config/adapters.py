"""What `adapter=DIR` says in a configuration: which base it is, how that is quantized, and what trains.

A configuration that names an adapter holds what its folder says, so that whoever reads it is told the truth:
`model.path` is the adapter's base, `quantization` and `precision` are those it was trained with, `peft` is the adapter
and no method with ranks of its own. What the words choose themselves stays as they say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tuner.adapter_config import AdapterConfig, read_adapter_config
from tuner.errors import ConfigError, ModelError, UnknownKey
from tuner.hub_errors import is_repository

FACTS = "tuner.json"
"""What an adapter's folder says of the base it was trained on."""

Settled = Callable[[Sequence[str], Mapping[str, Any]], DictConfig]
"""From words and values of further keys to a configuration that was checked and has no interpolation left."""


def is_said(group: str, words: Sequence[str]) -> bool:
    """Whether words choose a group or set one of its keys."""
    return bool(_about(group, words))


def chooses_model(words: Sequence[str]) -> bool:
    """Whether words choose another model, and not only how its conversations are written."""
    return any(not is_said("model.chat_template", [word]) for word in _about("model", words))


def _about(group: str, words: Sequence[str]) -> list[str]:
    return [word for word in words if word.lstrip("+~").startswith((f"{group}=", f"{group}."))]


def with_base_of(adapter: str, config: DictConfig, words: Sequence[str], settled: Settled) -> DictConfig:
    """A copy of `config` with the base of an adapter and with what that was quantized to.

    Args:
        adapter: its folder.
        config: of a command, composed from `words`.
        words: they have the last word.
        settled: the folder may be anyone's, and what it names is built.

    Raises:
        ConfigError: no adapter that can be loaded here, or its base is neither a folder nor a name on the Hub.
    """
    folder = Path(adapter).expanduser()
    settings = _settings_of(folder)
    found = config.copy()
    if not chooses_model(words):
        for key, value in _keys_of(settings, adapter).items():
            OmegaConf.update(found, f"model.{key}", value)
    # An adapter made elsewhere does not say what its base was quantized to.
    for group, node in (_nodes(folder / FACTS, settled) if (folder / FACTS).is_file() else {}).items():
        if not is_said(group, words):
            OmegaConf.update(found, group, node, merge=False, force_add=True)
    return found


def _settings_of(folder: Path) -> AdapterConfig:
    try:
        return read_adapter_config(folder)
    except ModelError as error:
        raise ConfigError(str(error)) from error


def _keys_of(adapter: AdapterConfig, said: str) -> dict[str, str | None]:
    """The keys of `model` that name the base: a folder here, else a repository of the Hugging Face Hub.

    Raises:
        ConfigError: neither.
    """
    if adapter.base is not None and Path(adapter.base).is_dir():
        return {"path": adapter.base, "source": None, "revision": None}
    if adapter.base is not None and is_repository(adapter.base):
        return {"path": None, "source": adapter.base, "revision": adapter.revision}
    raise ConfigError(
        f"adapter={said}: its base {adapter.base} is no folder here and no name on the Hugging Face Hub; say "
        "model.path=FOLDER, model.source=ORG/NAME or model=NAME"
    )


def with_adapter_trained(
    adapter: str, config: DictConfig, words: Sequence[str], member: Mapping[str, Any]
) -> DictConfig:
    """A copy of `config` whose `peft` is the adapter.

    Args:
        adapter: its folder.
        config: of a run, composed from `words`.
        words: a method that they choose stays, and is refused by a rule.
        member: what `peft=adapter` is.

    Raises:
        UnknownKey: words set a key of the method that would be replaced.
    """
    about = _about("peft", words)
    if keys := [word for word in about if word.lstrip("+~").startswith("peft.") and not word.startswith("peft.path=")]:
        problems = [f"{word} adapter={adapter}: the adapter brings its own; say one of the two" for word in keys]
        raise UnknownKey(problems, keys[0].lstrip("+~").partition("=")[0])
    trained = config.copy()
    if not about or config.peft == member:
        OmegaConf.update(trained, "peft", {**member, "path": adapter}, merge=False)
    return trained


def _nodes(file: Path, settled: Settled) -> dict[str, Any]:
    """The groups that `tuner.json` speaks of, composed and checked."""
    facts = _facts(file)
    keys = {f"{group}.{key}": node[key] for group, node in facts.items() for key in node if key != "name"}
    config = settled([f"{group}={node['name']}" for group, node in facts.items()], keys)
    return {group: config[group] for group in facts}


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
