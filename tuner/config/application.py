"""Hydra's command line: its switches, its run folder, its sweeps, driven as `hydra.main` drives them.

`hydra.main` itself ends every error with its own text and exit code 1. Here they are raised, so that a person's error
is one clear line; and a run is composed and checked before Hydra makes its folder.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, InstantiationException
from hydra.main import _get_rerun_conf
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tuner.config.checking import member_problems
from tuner.config.composition import check, config_loader, freeze, load, plain, quoted, without_hydra
from tuner.config.explaining import sentence
from tuner.config.signatures import signature_of
from tuner.errors import ConfigError, Interrupted, TunerError

Command = Callable[[DictConfig, list[str]], Any]


class Application:
    """A command that is configured by Hydra.

    Args:
        config_name: its primary configuration.
        settings: the class of `tuner.settings` that names its keys.
        command: gets the frozen, checked configuration and the words it was composed from, switches among them.
        makes_folder: it writes a run folder and may be swept.
        texts: keys whose value is a person's text, taken as it stands: commas, brackets and `${` mean nothing in it.
        pins: the commit of a `source` is asked for; a command that loads no weights needs none.
    """

    def __init__(
        self,
        config_name: str,
        settings: str,
        command: Command,
        *,
        makes_folder: bool,
        texts: Sequence[str],
        pins: bool = True,
    ) -> None:
        self.config_name = config_name
        self.settings = settings
        self.command = command
        self.makes_folder = makes_folder
        self.texts = texts
        self.pins = pins

    def main(self, words: Sequence[str]) -> Any:
        """Do what the words after the verb say.

        Returns:
            What the command returns; None for Hydra's own switches and sweeps.

        Raises:
            TunerError: what the command raises, and ConfigError for words that do not compose.
        """
        parser = get_args_parser()
        parser.error = _refused  # type: ignore[method-assign]
        # Intermixed: `seed=1,2 -m peft=lora,full` is as good as with the switch in front.
        args = parser.parse_intermixed_args(
            [_as_text(word) if word.partition("=")[0] in self.texts else word for word in words]
        )
        _at_most_one(args)
        self.config_name = args.config_name or self.config_name
        keys = [key for key, kind in signature_of(f"tuner.settings.{self.settings}").keys.items() if not kind.member]
        with _hydra(config_loader(args.config_path, args.config_dir, keys)) as hydra, _own_errors():
            if switched := self._switch(hydra, parser, args):
                return self._explained(switched, hydra.config_loader, args.overrides)
            switches = _composing_switches(args)
            if args.experimental_rerun:
                return self._call(_get_rerun_conf(args.experimental_rerun, args.overrides), switches)
            if args.multirun or "hydra.mode=MULTIRUN" in args.overrides:
                return self._sweep(hydra, args.overrides, switches)
            return self._run(hydra, args.overrides, switches)

    def _switch(
        self, hydra: Hydra, parser: argparse.ArgumentParser, args: argparse.Namespace
    ) -> Callable[[], None] | None:
        """What one of Hydra's switches asks for instead of the command."""
        name, words = self.config_name, args.overrides
        if args.help:
            return lambda: hydra.app_help(config_name=name, args_parser=parser, args=args)
        if args.hydra_help:
            return lambda: hydra.hydra_help(config_name=name, args_parser=parser, args=args)
        if args.shell_completion:
            if not words or words[0].partition("=")[0] not in ("install", "uninstall", "query"):
                raise ConfigError("--shell-completion: say install=SHELL, uninstall=SHELL or query=SHELL")
            return lambda: hydra.shell_completion(config_name=name, overrides=words)
        if args.cfg:
            return lambda: hydra.show_cfg(name, words, args.cfg, args.package, args.resolve)
        if args.info:
            return lambda: hydra.show_info(args.info, config_name=name, overrides=words)
        return None

    def _explained(self, switched: Callable[[], None], loader: ConfigLoader, words: list[str]) -> None:
        try:
            switched()
        except HydraException:
            load(loader, words, self.config_name)
            raise

    def _call(self, config: DictConfig, words: list[str]) -> Any:
        """The command on a composed configuration, checked and frozen."""
        check(config, self.settings)
        return self.command(freeze(config, pins=self.pins), words)

    def _run(self, hydra: Hydra, words: list[str], switches: list[str]) -> Any:
        composed = load(hydra.config_loader, words, self.config_name, command=self.settings)
        if composed.hydra.mode == RunMode.MULTIRUN:
            return self._sweep(hydra, words, switches)
        folder = Path(composed.hydra.run.dir).absolute()
        config = without_hydra(composed)
        if not self.makes_folder:
            return self._call(config, [*switches, *words])
        check(config, self.settings)
        raised: list[Exception] = []

        def task(config: DictConfig) -> Any:
            try:
                return self._call(_in_hydras_folder(config), [*switches, *words])
            except Exception as error:
                # Hydra would print a line of its own about an error that it hands on.
                raised.append(error)

        with _taken_away_if_empty(folder):
            _require_writable(folder)
            result = hydra.run(self.config_name, task, [*words, "hydra.mode=RUN", f"hydra.run.dir={quoted(folder)}"])
            if raised:
                raise raised[0]
        return result.return_value

    def _sweep(self, hydra: Hydra, words: list[str], switches: list[str]) -> None:
        if not self.makes_folder:
            raise ConfigError("--multirun: only training runs are swept")
        if any(word.lstrip("+").startswith("out=") for word in words):
            raise ConfigError("out=... together with --multirun: every trial has its own; say hydra.sweep.dir=FOLDER")
        above, first = _above_the_trials(words), _first_point(words, hydra.config_loader)
        _check_sweep(load(hydra.config_loader, above, self.config_name))
        try:
            hydra.multirun(self.config_name, _Point(self, switches), [*words, "hydra.mode=MULTIRUN"])
        except HydraException:
            load(hydra.config_loader, first, self.config_name)  # raises it in our words
            raise
        except KeyboardInterrupt as interrupt:
            raise interrupt.__cause__ or interrupt from None


@dataclass(frozen=True)
class _Point:
    """What Hydra's own sweeper calls for each point; ours runs frozen folders instead and reads the switches only.

    Attributes:
        application: whose command is swept.
        switches: the switches that decide, as the other words do, what is composed.
    """

    application: Application
    switches: list[str]

    def __call__(self, config: DictConfig) -> Any:
        words = OmegaConf.to_container(HydraConfig.get().overrides.task)
        assert isinstance(words, list)
        try:
            return self.application._call(_in_hydras_folder(config), [*self.switches, *map(str, words)])
        except Interrupted as stopped:
            # Hydra takes any Exception for the end of this trial only and begins the next.
            raise KeyboardInterrupt from stopped


def _check_sweep(composed: DictConfig) -> None:
    """Every key of what is above the trials: of `sweep`, and of a launcher and sweeper of ours.

    Raises:
        ConfigError: all that are unknown or of a wrong kind.
    """
    problems = member_problems("sweep", plain(composed.sweep), "tuner.settings.Sweep")
    for name in ("launcher", "sweeper"):
        keys = plain(composed.hydra[name])
        if str(keys["_target_"]).startswith("hydra_plugins.tuner_sweeper."):
            problems += member_problems(f"hydra.{name}", keys, str(keys["_target_"]))
    if problems:
        raise ConfigError(problems)


def _above_the_trials(words: list[str]) -> list[str]:
    """The words about launcher, sweeper and sweep, those with one value."""
    overrides = OverridesParser.create().parse_overrides(words)
    above = [o for o in overrides if o.key_or_group.startswith(("hydra.", "hydra/", "sweep."))]
    return [str(override.input_line) for override in above if not override.is_sweep_override()]


def _first_point(words: list[str], loader: ConfigLoader) -> list[str]:
    """The first of the values of every word of a sweep; intervals, which only a search can sample, left out."""
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(words)
    swept = [override for override in overrides if override.is_sweep_override()]
    first = [list(islice(o.sweep_string_iterator(), 1)) for o in swept if o.is_discrete_sweep()]
    keys = [o.get_key_element() for o in swept if o.is_discrete_sweep()]
    chosen = [f"{key}={value}" for key, values in zip(keys, first, strict=True) for value in values]
    return [str(override.input_line) for override in overrides if override not in swept] + chosen


def _composing_switches(args: argparse.Namespace) -> list[str]:
    """The switches that decide, as the other words do, what is composed."""
    given = {
        "--config-path": args.config_path,
        "--config-dir": args.config_dir,
        "--config-name": args.config_name,
        "--experimental-rerun": args.experimental_rerun,
    }
    return [f"{switch}={value}" for switch, value in given.items() if value is not None]


@contextmanager
def _taken_away_if_empty(folder: Path) -> Iterator[None]:
    """After an error, remove `folder` and its parents as far as they are new and nothing was written into them."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in new:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


def _require_writable(folder: Path) -> None:
    """Make the run folder, or raise a ConfigError that says why it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={folder}: cannot be made a run folder: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"out={folder}: cannot be made a run folder: no permission to write into it")


def _in_hydras_folder(config: DictConfig) -> DictConfig:
    """`out` is the folder Hydra made: that of a trial in a sweep, or what hydra.run.dir says."""
    config.out = HydraConfig.get().runtime.output_dir
    return config


def _as_text(word: str) -> str:
    """`prompt=Hello, (you)` in the quotes that Hydra's grammar wants; what is quoted already, or `null`, stays."""
    key, _, value = word.partition("=")
    if value in ("null", "???") or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        return word
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}".replace("${", "\\${")


def _refused(message: str) -> NoReturn:
    raise ConfigError(f"{message}; --hydra-help shows the switches")


def _at_most_one(args: argparse.Namespace) -> None:
    """Raise a ConfigError where two switches ask for different things."""
    asked = {"--run": args.run, "--multirun": args.multirun, "--cfg": args.cfg, "--info": args.info}
    names = [name for name, given in {**asked, "--shell-completion": args.shell_completion}.items() if given]
    if len(names) > 1:
        raise ConfigError(f"{' '.join(names)}: only one of these at a time")
    if args.resolve and not (args.cfg or args.help):
        raise ConfigError("--resolve: only together with --cfg or --help")


@contextmanager
def _hydra(loader: ConfigLoader) -> Iterator[Hydra]:
    """Hydra over our groups as the process's own, which plugins and completion expect."""
    hydra = Hydra("tuner", loader)
    GlobalHydra.instance().initialize(hydra)
    try:
        yield hydra
    finally:
        GlobalHydra.instance().clear()


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise Hydra's errors as ours.

    `instantiate` wraps what a constructor raises: a person's error is taken out, anything else is a bug and stays. The
    others are about words, as a point of a sweep with an option that does not exist.
    """
    try:
        yield
    except HydraException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, TunerError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from error
        if isinstance(error, InstantiationException):
            raise
        raise ConfigError(sentence(error)) from error
