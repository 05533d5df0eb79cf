"""`tuner cp NAME DEST`: a config file to edit."""

from __future__ import annotations

import shutil
from pathlib import Path

from tuner.config import conf_dir
from tuner.errors import ConfigError, nearest


def cp(name: str, dest: str) -> str:
    """Copy one of our config files.

    Args:
        name: `peft/lora`, `experiment/NAME`, `config`, or just the last part where only one file has it.
        dest: a file, or a folder that exists.

    Raises:
        ConfigError: no such file, several of that name, or `dest` exists.
    """
    source = _find(name.removesuffix(".yaml"))
    target = Path(dest).expanduser()
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise ConfigError(f"cp {name} {dest}: {target} exists and is left as it is")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return f"{target}"


def _find(name: str) -> Path:
    files = {file.relative_to(conf_dir()).with_suffix("").as_posix(): file for file in conf_dir().rglob("*.yaml")}
    if name in files:
        return files[name]
    same = [known for known in files if known.rpartition("/")[2] == name]
    if len(same) > 1:
        raise ConfigError(f"cp {name}: several files have this name; say one of {', '.join(sorted(same))}")
    if not same:
        raise ConfigError(f"cp {name}: no such config file; {nearest(name, files)}")
    return files[same[0]]
