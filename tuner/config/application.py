"""Hydra's command line: its switches, its run folder, its sweeps, driven as `hydra.main` drives them.

`hydra.main` itself ends every error with its own text and exit code 1. Here they are raised, so that a person's error
is one clear line; and a run is composed and checked before Hydra makes its folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from tuner.config.composition import check, config_loader, freeze, load
from tuner.errors import ConfigError

Command = Callable[[DictConfig, list[str]], Any]


class Application:
    """A command that is configured by Hydra.

    Args:
        config_name: its primary configuration.
        settings: the class of `tuner.settings` that names its keys.
        command: gets the frozen, checked configuration and the words it was composed from.
        makes_folder: it writes a run folder and may be swept.
    """

    def __init__(self, config_name: str, settings: str, command: Command, *, makes_folder: bool) -> None:
        self.config_name = config_name
        self.settings = settings
        self.command = command
        self.makes_folder = makes_folder

    def main(self, words: Sequence[str]) -> Any:
        """Do what the words after the verb say.

        Returns:
            What the command returns; None for Hydra's own switches and sweeps.

        Raises:
            TunerError: what the command raises, and ConfigError for words that do not compose.
        """
        parser = get_args_parser()
        args = parser.parse_args(list(words))
        _at_most_one(args)
        self.config_name = args.config_name or self.config_name
        with _hydra(args.config_dir) as hydra:
            if shown := self._switch(hydra, parser, args):
                shown()
                return None
            if not self.makes_folder:
                return self._call(load(hydra.config_loader, args.overrides, self.config_name), args.overrides)
            if args.multirun or hydra.get_mode(self.config_name, args.overrides) == RunMode.MULTIRUN:
                return self._sweep(hydra, args.overrides)
            return self._run(hydra, args.overrides)

    def _switch(
        self, hydra: Hydra, parser: argparse.ArgumentParser, args: argparse.Namespace
    ) -> Callable[[], None] | None:
        """What one of Hydra's switches asks for instead of the command."""
        name, words = self.config_name, args.overrides
        if args.help:
            return lambda: hydra.app_help(config_name=name, args_parser=parser, args=args)
        if args.hydra_help:
            return lambda: hydra.hydra_help(config_name=name, args_parser=parser, args=args)
        if args.cfg:
            load(hydra.config_loader, words, name)
            return lambda: hydra.show_cfg(name, words, args.cfg, args.package, args.resolve)
        if args.info:
            load(hydra.config_loader, words, name)
            return lambda: hydra.show_info(args.info, config_name=name, overrides=words)
        if args.shell_completion:
            return lambda: hydra.shell_completion(config_name=name, overrides=words)
        return None

    def _call(self, config: DictConfig, words: list[str]) -> Any:
        """The command on a composed configuration, frozen and checked."""
        config = config.copy()
        with open_dict(config):
            config.pop("hydra", None)
        frozen = freeze(config)
        check(frozen, self.settings)
        return self.command(frozen, words)

    def _run(self, hydra: Hydra, words: list[str]) -> Any:
        composed = load(hydra.config_loader, words, self.config_name)
        with open_dict(composed):
            del composed["hydra"]
        check(freeze(composed), self.settings)
        raised: list[BaseException] = []

        def task(config: DictConfig) -> Any:
            try:
                return self._call(self._in_folder(config), words)
            except Exception as error:
                # Hydra would print a line of its own about an error that it hands on.
                raised.append(error)

        result = hydra.run(self.config_name, task, [*words, "hydra.mode=RUN"])
        if raised:
            raise raised[0]
        return result.return_value

    def _sweep(self, hydra: Hydra, words: list[str]) -> None:
        if any(word.lstrip("+").startswith("out=") for word in words):
            raise ConfigError("out=... together with --multirun: every trial has its own; say hydra.sweep.dir=FOLDER")

        def task(config: DictConfig) -> Any:
            task_words = OmegaConf.to_container(HydraConfig.get().overrides.task)
            assert isinstance(task_words, list)
            return self._call(self._in_folder(config), [str(word) for word in task_words])

        hydra.multirun(self.config_name, task, [*words, "hydra.mode=MULTIRUN"])

    @staticmethod
    def _in_folder(config: DictConfig) -> DictConfig:
        """`out` is the folder Hydra made: that of a trial in a sweep, or what hydra.run.dir says."""
        config.out = HydraConfig.get().runtime.output_dir
        return config


def _at_most_one(args: argparse.Namespace) -> None:
    """Raise a ConfigError where two switches ask for different things."""
    asked = {"--run": args.run, "--multirun": args.multirun, "--cfg": args.cfg, "--info": args.info}
    names = [name for name, given in {**asked, "--shell-completion": args.shell_completion}.items() if given]
    if len(names) > 1:
        raise ConfigError(f"{' '.join(names)}: only one of these at a time")
    if args.resolve and not (args.cfg or args.help):
        raise ConfigError("--resolve: only together with --cfg or --help")
    if args.config_path or args.experimental_rerun:
        raise ConfigError(
            "--config-path and --experimental-rerun are not supported; say --config-dir FOLDER, out=FOLDER"
        )


@contextmanager
def _hydra(config_dir: str | None) -> Iterator[Hydra]:
    """Hydra over our groups as the process's own, which plugins and completion expect."""
    hydra = Hydra("tuner", config_loader(config_dir))
    GlobalHydra.instance().initialize(hydra)
    try:
        yield hydra
    finally:
        GlobalHydra.instance().clear()
