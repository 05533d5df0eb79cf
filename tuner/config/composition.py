"""From words to a configuration: `compose` them, `freeze` what would differ elsewhere, `check` every key.

Composing goes through Hydra's loader itself and not through `hydra.initialize`, which owns one global state for the
process: this works inside another Hydra application, in a notebook and in a test.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.default_element import ResultDefault
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tuner.config.adapters import with_adapter_trained, with_base_of
from tuner.config.checking import problems_of
from tuner.config.explaining import COMPOSE_ERRORS, explain, one_line, unknown_key
from tuner.config.folder import conf_dir
from tuner.config.groups import SCALE, Groups, at_home
from tuner.config.pinning import pin
from tuner.config.places import refuse_shape_of_folder
from tuner.config.replaced import without_keys_of_replaced
from tuner.config.scaling import shrunk
from tuner.errors import ConfigError, IllegalCombination, UnknownKey

PRIMARY = "config"
LOCAL_PATHS = ("adapter", "peft.path", "model.path", "data.path", "data.val_path", "data.cache_dir")
"""Keys that name a file or folder, made absolute by `freeze`."""
PLAIN = re.compile(r"[\w./:@%+ -]+")
"""Values that Hydra reads as they are; a comma would be a sweep."""


def compose(overrides: Sequence[str] = (), *, config_name: str = PRIMARY, config_dir: str | None = None) -> DictConfig:
    """The configuration that command-line words make.

    Args:
        overrides: as on the command line: `["peft=qlora", "optimizer.lr=1e-4"]`.
        config_name: the primary configuration; `verb/generate` for that verb.
        config_dir: a further folder of groups that goes before ours.

    Raises:
        ConfigError: a group, option or key that does not exist, or a word that cannot be parsed.
    """
    return without_hydra(load(config_loader(config_dir=config_dir), overrides, config_name))


def config_loader(conf: str | None = None, config_dir: str | None = None, keys: Collection[str] = ()) -> ConfigLoader:
    """Hydra's loader over our groups.

    Args:
        conf: a folder of groups in place of ours.
        config_dir: a further folder of groups that goes before.
        keys: names that are keys of the command even where a group is called the same: `evaluate checkpoint=DIR`.

    Raises:
        ConfigError: one of these is no folder.
    """
    setbase("1.3")
    setup_globals()
    # Cached for each configuration: one run has one token, the next compose has another.
    OmegaConf.register_new_resolver("tuner.token", lambda: secrets.token_hex(3), use_cache=True, replace=True)
    search_path = create_config_search_path(_folder("--config-path", conf or str(conf_dir())))
    if config_dir is not None:
        before = SearchPathQuery(provider="main")
        search_path.prepend("command-line", f"file://{_folder('--config-dir', config_dir)}", before)
    loader = _Loader(config_search_path=search_path)
    loader.repository = Groups(search_path, keys)
    return loader


class _Loader(ConfigLoaderImpl):
    """Hydra's loader, of whose configurations a run that names an adapter holds what that brings, which shrinks a model
    by a scale, which leaves out what an experiment says of a method that words replace, and refuses words that a
    model's folder overrules.

    Here and not after composing, because everything composes through the loader: Hydra's own switches and the points of
    a sweep too. A scale is worked out before the words set keys, so these have the last word.
    """

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        config: DictConfig | None = None
        for scales, group in groupby(
            defaults, lambda default: at_home(default.config_path or "").startswith(f"{SCALE}/")
        ):
            part = super()._compose_config_from_defaults_list(list(group), repo)
            if config is None:
                config = part
            else:
                config.merge_with(_scaled(config, part) if scales else part)
        assert config is not None  # Hydra's own node is always there
        return config

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        config = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        without_keys_of_replaced(config, overrides)
        refuse_shape_of_folder(config, overrides)
        adapter = OmegaConf.select(config, "adapter", throw_on_missing=False, throw_on_resolution_failure=False)
        if not isinstance(adapter, str) or "peft" not in config:
            return config
        member = yaml.safe_load((conf_dir() / "peft" / "adapter.yaml").read_text(encoding="utf-8"))
        return with_base_of_adapter(adapter, with_adapter_trained(adapter, config, overrides, member), overrides)


def _scaled(config: DictConfig, scale: DictConfig) -> DictConfig:
    """A member of `scale` whose sizes of the model are worked out for the one that was composed."""
    if "model" in scale and "model" in config:
        keys = [OmegaConf.to_container(node.model, resolve=True) for node in (config, scale)]
        scale.model = shrunk(*cast(list[dict[str, Any]], keys))
    return scale


def load(
    loader: ConfigLoader,
    words: Sequence[str],
    config_name: str = PRIMARY,
    *,
    command: str | None = None,
) -> DictConfig:
    """Compose with Hydra's own node kept under `hydra`.

    Args:
        loader: of `config_loader`.
        words: the overrides.
        config_name: the primary configuration.
        command: where words do not compose, the others are checked as this class of `tuner.settings`, so that a person
            sees all problems at once.

    Raises:
        ConfigError: as `compose`.
    """

    def attempt(words: Sequence[str]) -> DictConfig:
        return loader.load_configuration(config_name, list(words), RunMode.RUN)

    try:
        return attempt(words)
    except COMPOSE_ERRORS as error:
        problems, rest = explain(error, words, attempt)
        if rest is not None and command is not None:
            problems += [problem.sentence for problem in problems_of(plain(without_hydra(rest)), command)]
        raise ConfigError(problems) from error


def load_point(loader: ConfigLoader, master: DictConfig, words: Sequence[str]) -> DictConfig:
    """The configuration of one point of a sweep, without Hydra's own node.

    Args:
        loader: of `config_loader`.
        master: what the words of the whole sweep compose, with Hydra's own node.
        words: of the point.

    Raises:
        ConfigError: as `compose`; UnknownKey where a word names a key that this point does not have.
    """
    try:
        return without_hydra(loader.load_sweep_config(master, list(words)))
    except COMPOSE_ERRORS as error:
        key = unknown_key(error)
        problems, _ = explain(error, words, lambda some: without_hydra(loader.load_sweep_config(master, list(some))))
        if key is not None and len(problems) == 1:
            raise UnknownKey(problems[0], key) from error
        raise ConfigError(problems) from error


def with_base_of_adapter(adapter: str, config: DictConfig, words: Sequence[str]) -> DictConfig:
    """A command's configuration with the base of an adapter, as far as `words` do not choose another.

    Raises:
        ConfigError: no adapter that can be loaded here, or its base is no folder.
    """
    return with_base_of(adapter, config, words, _settled)


def _settled(words: Sequence[str], keys: Mapping[str, Any]) -> DictConfig:
    config = compose(words)
    for key, value in keys.items():
        OmegaConf.update(config, key, value, force_add=True)
    check(config)
    return freeze(config)


def without_hydra(config: DictConfig) -> DictConfig:
    """A configuration without Hydra's own node, which is taken out in place."""
    with open_dict(config):
        config.pop("hydra", None)
    return config


def plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Resolved plain containers; a mandatory value that was not given stays `???`.

    Raises:
        ConfigError: an interpolation that names no key.
    """
    try:
        node = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
        container = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {one_line(error)}") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def freeze(config: DictConfig, *, pins: bool = True) -> DictConfig:
    """A resolved copy that means the same in any process on any folder: what a run writes as its config.yaml.

    Paths become absolute, a logger's `log_dir` among them, `train.num_threads` this machine's number and a logger's
    `tracking_uri` the store that will be used: the key itself, else `MLFLOW_TRACKING_URI`, else mlflow.db in the
    current folder. With a `model.source` or `data.source`, the `revision` becomes the commit it names. Freezing a
    frozen configuration changes nothing.

    Args:
        config: composed.
        pins: False leaves revisions as they are and asks no hub.

    Raises:
        ModelError, DataError: the hub has to be asked for a `source`, and cannot be reached or does not give it.
        ConfigError: the extra `hub` or `datasets` is not installed.
    """
    frozen: DictConfig = OmegaConf.create(_literal(plain(config)))
    OmegaConf.set_struct(frozen, True)
    if isinstance(out := OmegaConf.select(frozen, "out"), str):
        frozen.out = _absolute(out)
    for key in LOCAL_PATHS:
        if isinstance(path := OmegaConf.select(frozen, key, throw_on_missing=False), str):
            OmegaConf.update(frozen, key, _absolute(path))
    resume = OmegaConf.select(frozen, "checkpoint.resume", throw_on_missing=False)
    if isinstance(resume, str) and resume not in ("auto", "never"):
        frozen.checkpoint.resume = _absolute(resume)
    template = OmegaConf.select(frozen, "model.chat_template", throw_on_missing=False)
    if isinstance(template, str) and template.endswith(".jinja"):  # else the name of a built-in one
        frozen.model.chat_template = _absolute(template)
    if isinstance(train := frozen.get("train"), DictConfig) and train.get("num_threads", 0) is None:
        train.num_threads = available_cpus()
    _settle_logger(frozen.get("logger"))
    if pins:
        pin(frozen)
    return frozen


def check(config: DictConfig | Mapping[str, Any], command: str = "Run") -> None:
    """Every key and every rule, in milliseconds and without importing torch.

    Args:
        config: composed, frozen or a plain mapping.
        command: the class of `tuner.settings` that names its keys.

    Raises:
        ConfigError: all problems together, each naming the key, the value and the valid choices; IllegalCombination if
            all of them are rules between values that are right in themselves.
    """
    problems = problems_of(plain(config), command)
    rules = [problem.rule for problem in problems if problem.rule is not None]
    sentences = [problem.sentence for problem in problems]
    if problems and len(rules) == len(problems):
        raise IllegalCombination(sentences, rules)
    if problems:
        raise ConfigError(sentences)


def quoted(value: object) -> str:
    """A value as Hydra's override grammar reads it back unchanged: backslashes count only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(value)) + "'"


def as_word(key: str, value: object) -> str:
    """`key=value` as a command-line word, in quotes where the grammar needs them."""
    text = str(value)
    return f"{key}={text if PLAIN.fullmatch(text) else quoted(text)}"


def available_cpus() -> int:
    """The CPUs this process may use, which in a container or a SLURM job are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _folder(switch: str, folder: str) -> str:
    if not Path(folder).is_dir():
        raise ConfigError(f"{switch} {folder}: no such folder")
    return str(Path(folder).absolute())


def _literal(node: Any) -> Any:
    """Resolved containers whose texts stay as they are: a `${` in a prompt is no interpolation."""
    if isinstance(node, dict):
        return {key: _literal(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_literal(value) for value in node]
    return node.replace("${", "\\${") if isinstance(node, str) else node


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _settle_logger(node: Any) -> None:
    """Write down where a logger, or each of many, keeps its runs."""
    if not isinstance(node, DictConfig):
        return
    if "tracking_uri" in node:
        node.tracking_uri = _absolute_uri(
            node.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        )
    if isinstance(log_dir := node.get("log_dir"), str) and "://" not in log_dir:  # a bucket has no place here
        node.log_dir = _absolute(log_dir)
    for child in node.values():
        _settle_logger(child)


def _absolute_uri(uri: str) -> str:
    """A SQLite store's file made absolute; any other store, and SQLite in memory, as it is."""
    scheme, found, path = uri.partition("sqlite:///")
    if scheme or not found or not path or path.startswith((":memory:", "file:")):
        return uri
    return f"sqlite:///{Path(path).absolute()}"
