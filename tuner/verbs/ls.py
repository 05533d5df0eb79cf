"""`tuner ls`: what can be chosen, and what has been run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tuner.config import EXPERIMENT, SCALE, conf_dir, group_and_option
from tuner.errors import ConfigError, nearest

RUNS = "runs"

NOT_CHOSEN = ("verb",)
"""Folders of `conf` that are no groups of a run or a sweep."""


def ls(group: str | None = None, folder: str | None = None) -> str:
    """The groups with their options and the experiments with a line each, or the options of one group likewise.

    `runs` is no group: it lists run folders, those under `folder` where one is given.

    Raises:
        ConfigError: a group or folder that does not exist, or a folder after a group.
    """
    if group == RUNS:
        from tuner.verbs.ls_runs import list_runs

        return list_runs(folder)
    if folder is not None:
        raise ConfigError(f"ls {group} {folder}: a group has no folder; say ls {group}, or ls {RUNS} {folder}")
    groups = options()
    if group is not None:
        if group not in groups:
            raise ConfigError(f"ls {group}: no such group; {nearest(group, [*groups, RUNS])}")
        return _a_line_each(groups[group])
    experiments = groups.pop(EXPERIMENT)
    width = max(map(len, groups))
    lines = [f"{name.ljust(width)}  {' '.join(files)}" for name, files in groups.items()]
    how = f"tuner ls GROUP says what each option is; choose with GROUP=OPTION, and +{SCALE}=OPTION"
    runs = "ready-made runs, each chosen with experiment=NAME; tuner cp NAME DEST copies one to edit"
    return "\n".join([*lines, "", how, "", runs, "", _a_line_each(experiments)])


def options() -> dict[str, dict[str, Path]]:
    """Each group's options and their files."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(conf_dir().rglob("*.yaml")):
        group, option = group_and_option(file.relative_to(conf_dir()).with_suffix("").as_posix())
        if group and group.split("/")[0] not in NOT_CHOSEN:
            found.setdefault(group, {})[option] = file
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


def _a_line_each(files: Mapping[str, Path]) -> str:
    width = max(map(len, files))
    return "\n".join(f"{name.ljust(width)}  {summary(file)}".rstrip() for name, file in files.items())
