"""`tuner ls`: what can be chosen."""

from __future__ import annotations

from pathlib import Path

from tuner.config import conf_dir
from tuner.errors import ConfigError, nearest

NOT_CHOSEN = ("verb",)
"""Folders of `conf` that are no groups of a run or a sweep."""


def ls(group: str | None = None) -> str:
    """The groups with their options, or the options of one group with a line each.

    Raises:
        ConfigError: a group that does not exist.
    """
    groups = options()
    if group is None:
        width = max(map(len, groups))
        lines = [f"{name.ljust(width)}  {' '.join(files)}" for name, files in groups.items()]
        return "\n".join([*lines, "", "tuner ls GROUP says what each option is; choose with GROUP=OPTION"])
    if group not in groups:
        raise ConfigError(f"ls {group}: no such group; {nearest(group, groups)}")
    files = groups[group]
    width = max(map(len, files))
    return "\n".join(f"{name.ljust(width)}  {summary(file)}".rstrip() for name, file in files.items())


def options() -> dict[str, dict[str, Path]]:
    """Each group's options and their files."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(conf_dir().rglob("*.yaml")):
        group = file.relative_to(conf_dir()).parent.as_posix()
        if group != "." and group.split("/")[0] not in NOT_CHOSEN:
            found.setdefault(group, {})[file.stem] = file
    return found


def summary(file: Path) -> str:
    """The first sentence of a config file's comment."""
    comment: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comment.append(line.lstrip("# ").rstrip())
    return " ".join(comment).partition(". ")[0].rstrip(".")
