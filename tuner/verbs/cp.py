"""`tuner cp NAME DEST`: a config file to edit."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from tuner.config import EXPERIMENT, as_word, compose, conf_dir, group_and_option
from tuner.errors import ConfigError, nearest


def cp(name: str, dest: str) -> str:
    """Copy one of our config files and say, where that is possible, the command that chooses the copy.

    Args:
        name: `peft/lora`, `experiment/llama2/7B_lora_single_device`, `config`, or its end where only one file has it.
        dest: a file, or a folder that exists.

    Raises:
        ConfigError: no such file, several of that name, or `dest` exists or is no name of a config file.
    """
    known = _find(name.removesuffix(".yaml"))
    source = conf_dir() / f"{known}.yaml"
    target = Path(dest).expanduser()
    if target.is_dir():
        target = target / source.name
    if target.suffix != ".yaml":
        raise ConfigError(f"cp {name} {dest}: expected a folder that exists, or a file that ends in .yaml")
    if target.exists():
        raise ConfigError(f"cp {name} {dest}: {target} exists and is left as it is")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return "\n".join([f"{target}", *_how_to_choose(group_and_option(known)[0], target)])


def _find(name: str) -> str:
    """The one config file that has a name or ends in it, without its ending."""
    files = {file.relative_to(conf_dir()).with_suffix("").as_posix() for file in conf_dir().rglob("*.yaml")}
    if name in files:
        return name
    same = sorted(known for known in files if known.endswith(f"/{name}"))
    if len(same) > 1:
        raise ConfigError(f"cp {name}: several files have this name; say one of {', '.join(same)}")
    if not same:
        raise ConfigError(f"cp {name}: no such config file; {nearest(name, files)}")
    return same[0]


def _how_to_choose(group: str, copy: Path) -> list[str]:
    """The command that chooses a copy: none for a file of no group, or for one that lies in no folder of its group.

    An experiment lies well in a folder `experiment`. Elsewhere it is added as an option of a group that is called like
    its folder; where that name is taken, the file has to move.
    """
    parts, wanted = copy.parent.parts, tuple(group.split("/"))
    last = range(len(parts) - len(wanted), -1, -1)
    if group and (at := next((i for i in last if parts[i : i + len(wanted)] == wanted), None)) is not None:
        option = Path(*parts[at + len(wanted) :], copy.stem)
        return [_command(Path(*parts[:at]), as_word(group, option.as_posix()))]
    if group != EXPERIMENT:
        return []
    folder = copy.absolute().parent
    word = as_word(f"+{folder.name}", copy.stem)
    if _composes(word, folder.parent):
        return [_command(folder.parent, word)]
    moved = copy.parent / EXPERIMENT
    move = f"mkdir -p {shlex.quote(str(moved))} && mv {shlex.quote(str(copy))} {shlex.quote(str(moved))}/"
    return [f"{move} && {_command(copy.parent, as_word(EXPERIMENT, copy.stem))}"]


def _command(folder: Path, word: str) -> str:
    return f"python -m tuner --config-dir {shlex.quote(str(folder))} {shlex.quote(word)}"


def _composes(word: str, folder: Path) -> bool:
    try:
        compose([word], config_dir=str(folder))
    except ConfigError:
        return False
    return True
