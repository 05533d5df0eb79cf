"""Where the config groups are, and which of them there are."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """The folder of the config groups: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def options_of(group: str) -> set[str]:
    """The names a group can be set to, those in folders with the folder before them."""
    folder = conf_dir() / group
    return {file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")}
