"""What is to be done with a run folder that exists."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from tuner.errors import CheckpointError

Decision = Literal["fresh", "continue", "finished"]

DOES_NOT_MATTER = (
    "out",
    "checkpoint.",
    "logger.",
    "device",
    "train.log_every_steps",
    "train.num_samples",
    "train.max_new_tokens",
    "train.objective",
    "trust_targets",
    "sweep.",
)
"""Keys (and, with a dot, groups) that change neither weights nor data nor what is measured when."""

LENGTH = ("train.max_steps", "train.epochs")


def decide(out: Path, config: Mapping[str, Any], resume: str) -> Decision:
    """Whether `out` is new, to be continued, or done.

    Args:
        out: the run folder.
        config: the resolved configuration as nested plain containers.
        resume: `auto` or `never`.

    Raises:
        CheckpointError: `never` on a folder that holds a run, or a changed key that matters, by name.
    """
    frozen = out / "config.yaml"
    if not (frozen.is_file() and (out / "environment.json").is_file()):  # a trial's config is there before it begins
        return "fresh"
    if resume == "never":
        raise CheckpointError(f"{out} holds a run and checkpoint.resume=never; give another out, or resume=auto")
    before, now = dict(_flat(yaml.safe_load(frozen.read_text(encoding="utf-8")))), dict(_flat(config))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    matter = [key for key in changed if key not in LENGTH and not key.startswith(DOES_NOT_MATTER)]
    if matter:
        said = ", ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in matter)
        raise CheckpointError(f"{out} holds another run: {said}; give another out, or the old values")
    grew = any(key in LENGTH and (now.get(key) or 0) > (before.get(key) or 0) for key in changed)
    return "finished" if _status(out) == "finished" and not grew else "continue"


def _status(out: Path) -> str | None:
    summary = out / "summary.json"
    return json.loads(summary.read_text(encoding="utf-8"))["status"] if summary.is_file() else None


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
