"""A translated YAML as an experiment preset on disk, composed and checked before it is there."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.config.composition import as_word, check, compose
from tuner.config.folder import conf_dir
from tuner.config.torchtune.keys import CONTEXT
from tuner.config.torchtune.preset import GROUPS, Preset, Setting, plain
from tuner.config.torchtune.reading import read
from tuner.config.torchtune.translation import translation_of
from tuner.errors import ConfigError

GROUP_NAME = re.compile(r"[A-Za-z_][\w-]*")
TUNER = "python -m tuner"


@dataclass(frozen=True)
class Place:
    """How a preset is found.

    Attributes:
        file: the YAML.
        root: what `--config-dir` names.
        word: what chooses it.
    """

    file: Path
    root: Path
    word: str

    def command(self, verb: str, words: Sequence[str]) -> str:
        """The line that runs it, or does what `verb` says, for a shell."""
        line = [*TUNER.split(), *verb.split(), "--config-dir", str(self.root), self.word, *words]
        return " ".join(map(shlex.quote, line))


def translate(source: str, dest: str) -> str:
    """Write the experiment that a torchtune YAML means here.

    Args:
        source: a YAML of its LoRA, QLoRA or full recipe for one device.
        dest: the preset, or a folder for it.

    Returns:
        Where it is, the commands that check and run it, and what has no counterpart.

    Raises:
        ConfigError: `source` cannot be read or translated, or `dest` exists or cannot be found by `--config-dir`.
    """
    file = Path(source).expanduser()
    place = place_of(Path(dest).expanduser(), file)
    keys = read(file)
    try:
        preset = translation_of(keys)
        text = preset_text(preset, file, place)
        _require_composes(text, preset.trusted)
    except ConfigError as error:
        raise ConfigError(f"{source}: {problem}" for problem in error.problems) from error
    _write(place.file, text)
    return _report(preset, place)


def place_of(target: Path, source: Path) -> Place:
    """The folder for `--config-dir` and the word for a preset at `target`.

    In a folder called `experiment` it is `experiment=NAME`; elsewhere the folder it lies in is a group of its own.

    Raises:
        ConfigError: it exists, or no word would find it.
    """
    file = target / f"{source.stem}.yaml" if target.is_dir() else target
    if file.exists():
        raise ConfigError(f"cp --from-torchtune {source} {target}: {file} exists and is left as it is")
    if file.suffix != ".yaml":
        raise ConfigError(f"cp --from-torchtune {source} {target}: the preset's name ends in .yaml")
    name = Path(os.path.abspath(file)).with_suffix("")
    experiments = next((folder for folder in name.parents if folder.name == "experiment"), None)
    if experiments is not None:
        word = as_word("experiment", name.relative_to(experiments).as_posix())
        return Place(file, _shown(experiments.parent), word)
    group = name.parent.name
    if not GROUP_NAME.fullmatch(group) or (conf_dir() / group).is_dir():
        raise ConfigError(
            f"cp --from-torchtune {source} {target}: Hydra finds no preset in a folder of this name; "
            f"say {file.parent / 'experiment' / file.name}"
        )
    return Place(file, _shown(name.parent.parent), as_word(f"+{group}", name.name))


def preset_text(preset: Preset, source: Path, place: Place) -> str:
    """The YAML, each value with the key of torchtune's it comes from."""
    comments = [
        f"{preset.value('peft')} on {preset.value('model')}, translated from torchtune's {source.name}.",
        place.command("", [*preset.trusted, *preset.needed]),
        "",
        "Without a counterpart, or to be seen to:",
        *(f"  {sentence}" for sentence in preset.listed or ["nothing"]),
        "",
        "So here in any case:",
        *(f"  {sentence}" for sentence in preset.held),
    ]
    head = [f"# {one_line(comment)}".rstrip() for comment in comments]
    groups = [_line(f"  - override /{key}", setting) for key, setting in preset.settings.items() if key in GROUPS]
    return "\n".join(["# @package _global_", *head, "defaults:", *groups, "  - _self_", *_body(preset), ""])


def _body(preset: Preset) -> list[str]:
    lines: list[str] = []
    settings = {key: setting for key, setting in preset.settings.items() if key not in GROUPS}
    for top in dict.fromkeys(key.partition(".")[0] for key in settings):
        inside = [key for key in settings if key.startswith(f"{top}.")]
        lines += [f"{top}:"] if inside else [_line(top, settings[top])]
        lines += [_line(f"  {key.partition('.')[2]}", settings[key]) for key in inside]
    return lines


def _line(name: str, setting: Setting) -> str:
    text = CONTEXT if setting.value == CONTEXT else plain(setting.value).replace("${", "\\${")
    return f"{name}: {text}  # {one_line(setting.origin)}"


def one_line(text: str) -> str:
    """Without what would end a comment and begin a line of the preset."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}") from error


def _require_composes(text: str, trusted: Sequence[str]) -> None:
    """Raise a ConfigError unless the preset composes to a run that passes every check."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "experiment" / "translated.yaml"
        file.parent.mkdir()
        file.write_text(text, encoding="utf-8")
        check(compose(["experiment=translated", *trusted], config_dir=folder))


def _report(preset: Preset, place: Place) -> str:
    lines = [
        str(place.file),
        f"check: {place.command('validate', preset.trusted)}",
        f"run:   {place.command('', [*preset.trusted, *preset.needed])}",
    ]
    if preset.listed:
        lines += [
            "",
            "Without a counterpart, or to be seen to (also in the file):",
            *(f"  {one_line(s)}" for s in preset.listed),
        ]
    return "\n".join(lines)


def _shown(folder: Path) -> Path:
    """Relative to the current folder where it lies in it."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
