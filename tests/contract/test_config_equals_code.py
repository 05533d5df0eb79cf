"""Every YAML of `conf/` and the signature it feeds name the same keys, both ways, and the YAML alone has defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tuner.__main__ import VERBS
from tuner.config import compose, conf_dir
from tuner.config.checking import COMPONENTS, INSTRUCTIONS, problems_of
from tuner.config.composition import plain
from tuner.config.signatures import definitions, signature_of
from tuner.verbs.ls import options, summary

GROUPS = {
    "model": "models",
    "data": "data",
    "peft": "peft",
    "quantization": "quantization",
    "precision": "precision",
    "memory": "memory",
    "optimizer": "optimizers",
    "schedule": "schedules",
    "distributed": "distributed",
    "checkpoint": "checkpoint",
    "logger": "logging",
}
FOUND = options()
MEMBERS = [(group, name) for group in GROUPS for name in FOUND.get(group, {})]
PRESETS = [(group, name) for group in ("experiment", "scale") for name in FOUND[group]]
"""Options that compose others and name no class."""
PLUGINS = {
    "hydra/launcher": {"local": "LocalLauncher", "slurm": "SlurmLauncher"},
    "hydra/sweeper": {"grid": "GridSweeper"},
}
"""Of a sweep: Hydra finds these in one module of ours, and has members of its own beside them."""
FILES = sorted(conf_dir().rglob("*.yaml"))
FREE = {("optimizer", "custom")}
"""Members whose class the user names."""


def read(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text())
    return dict(content or {})


def named() -> list[tuple[str, str]]:
    """The members that name a class of ours; the others are presets over one that does."""
    return [(g, n) for g, n in MEMBERS if "_target_" in read(FOUND[g][n]) and (g, n) not in FREE]


def test_every_group_was_found() -> None:
    assert set(FOUND) == {*GROUPS, *PLUGINS, "experiment", "scale"}
    assert sum(map(len, FOUND.values())) == len(FILES) - len(list(conf_dir().glob("verb/*"))) - 1
    assert {group: set(FOUND[group]) for group in PLUGINS} == {group: set(PLUGINS[group]) for group in PLUGINS}
    assert len(MEMBERS) >= 30
    assert len(named()) >= 24
    assert set(GROUPS.values()) <= set(COMPONENTS)
    assert len(PRESETS) == len(list((conf_dir() / "experiment").rglob("*.yaml"))) + 1 >= 25


@pytest.mark.parametrize(("group", "name"), PRESETS, ids="/".join)
def test_a_preset_of_a_run_composes_and_names_no_class(group: str, name: str) -> None:
    file = FOUND[group][name]
    assert file == conf_dir() / group / f"{name}.yaml"
    text = file.read_text()
    assert text.startswith("# @package _global_\n# ")
    assert "_target_" not in text
    assert f"#   python -m tuner experiment={name if group == 'experiment' else ''}" in text
    assert problems_of(plain(compose([f"{'+' if group == 'scale' else ''}{group}={name}"]))) == []


@pytest.mark.parametrize(("group", "name"), named(), ids="/".join)
def test_names_the_class_in_the_module_of_its_stem(group: str, name: str) -> None:
    target = read(FOUND[group][name])["_target_"]
    assert target.split(".")[:-1] == ["tuner", GROUPS[group], name]


@pytest.mark.parametrize(("group", "name"), named(), ids="/".join)
def test_keys_equal_the_signature_and_have_no_default_in_python(group: str, name: str) -> None:
    content = read(FOUND[group][name])
    signature = signature_of(content["_target_"])
    run_time = {key for key, kind in signature.keys.items() if kind.run_time}
    composed = {"loggers"} if (group, name) == ("logger", "many") else set()  # by the defaults list
    assert content.keys() - INSTRUCTIONS.keys() - {"defaults"} | composed == signature.keys.keys() - run_time
    assert not signature.defaults
    assert not run_time or content.get("_partial_") is True, "arguments that no key gives need _partial_"


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, members in PLUGINS.items() for n in members], ids="/".join)
def test_a_plugin_names_its_class_and_all_its_keys(group: str, name: str) -> None:
    content = read(FOUND[group][name])
    assert content["_target_"] == f"hydra_plugins.tuner_sweeper.{PLUGINS[group][name]}"
    signature = signature_of(content["_target_"])
    assert content.keys() - {"_target_"} == signature.keys.keys()
    assert not any(kind.run_time for kind in signature.keys.values())
    assert not signature.defaults


@pytest.mark.parametrize(("group", "name"), [pair for pair in MEMBERS if pair not in FREE], ids="/".join)
def test_composes_into_a_run_without_problems(group: str, name: str) -> None:
    config = plain(compose([f"{group}={name}"]))
    assert [problem for problem in problems_of(config) if "needs a value" not in problem.sentence] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(conf_dir()).as_posix())
def test_begins_by_saying_what_it_is(file: Path) -> None:
    assert len(summary(file)) > 10


def test_no_interpolation_of_hydras_state_outside_its_own_folder() -> None:
    users = [file for file in FILES if "hydra" not in file.relative_to(conf_dir()).parts]
    assert len(users) == len(FILES) - len(list(conf_dir().glob("hydra/**/*.yaml")))
    assert [file for file in users if "${hydra:" in file.read_text()] == []


@pytest.mark.parametrize("verb", [verb for verb in VERBS.values() if verb.config], ids=lambda verb: verb.function)
def test_settings_equal_the_primary_configuration(verb: Any) -> None:
    config = plain(compose(config_name=verb.config))
    settings = signature_of(f"tuner.settings.{verb.settings}")
    assert set(config) == set(settings.keys)
    assert not settings.defaults


def test_train_settings_equal_the_primary_configuration() -> None:
    content = read(conf_dir() / "config.yaml")
    assert set(content["train"]) == set(signature_of("tuner.settings.Train").keys)
    assert set(content["sweep"]) == set(signature_of("tuner.settings.Sweep").keys)


@pytest.mark.parametrize("name", VERBS)
def test_verb_has_its_function(name: str) -> None:
    module, _, function = VERBS[name].function.partition(":")
    assert function in definitions(module)
