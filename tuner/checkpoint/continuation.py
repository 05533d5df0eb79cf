"""What is to be done with a run folder that exists."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from tuner.checkpoint.folder import MANIFEST, checkpoints_of, folder_of, step_of
from tuner.errors import CheckpointError

Decision = Literal["fresh", "continue", "finished"]

DOES_NOT_MATTER = (
    "out",
    "checkpoint.",
    "logger.",
    "data.cache",
    "data.workers",
    "device",
    "train.on_nonfinite",  # the steps that are done were finite, or were skipped when that was asked for
    "train.on_oom",  # what memory ran out for was not stepped
    "train.log_every_steps",
    "train.num_samples",
    "train.max_new_tokens",
    "train.objective",
    "trust_targets",
    "sweep.",
    "estimate.",
)
"""Keys (and, with a dot, groups) that change neither weights nor data nor what is measured when."""

LENGTH = ("train.max_steps", "train.epochs")


def decide(out: Path, config: Mapping[str, Any], resume: str) -> Decision:
    """Whether `out` is new, to be continued, or done.

    Args:
        out: the run folder.
        config: the resolved configuration as nested plain containers.
        resume: `auto`, `never`, or what `origin_of` reads: a run that began from another one's checkpoint has its own
            later.

    Raises:
        CheckpointError: `never` on a folder that holds a run, a damaged config.yaml, or a changed key that matters, by
            name.
    """
    frozen = out / "config.yaml"
    if not (frozen.is_file() and (out / "environment.json").is_file()):  # a trial's config is there before it begins
        return "fresh"
    if resume == "never":
        raise CheckpointError(f"{out} holds a run and checkpoint.resume=never; give another out, or resume=auto")
    changed = _changed(out, config)
    if matter := {key: values for key, values in changed.items() if _matters(key) and key not in LENGTH}:
        raise CheckpointError(f"{out} holds another run: {_said(matter)}; give another out, or the old values")
    grew = any(key in LENGTH and (now or 0) > (before or 0) for key, (before, now) in changed.items())
    return "finished" if _status(out) == "finished" and not grew else "continue"


def changed_since(run: Path, config: Mapping[str, Any]) -> str:
    """The keys that matter and differ from those of another run, with both values, as a clause; or nothing."""
    if not (run / "config.yaml").is_file():
        return f"unknown, {run} has no config.yaml"
    return _said({key: values for key, values in _changed(run, config).items() if _matters(key)})


def _changed(run: Path, config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose value was another one in a run folder's config.yaml: what it was, what it is."""
    before, now = dict(_flat(_read(run / "config.yaml"))), dict(_flat(config))
    pairs = {key: (before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())}
    return {key: (was, is_) for key, (was, is_) in pairs.items() if was != is_}


def _matters(key: str) -> bool:
    return not key.startswith(DOES_NOT_MATTER)


def _said(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} was {was} and is {now}" for key, (was, now) in changed.items())


def origin_of(resume: str, out: Path) -> Path | None:
    """The checkpoint of another run that `checkpoint.resume` names; None for `auto` and `never`.

    Args:
        resume: `RUN` for its newest, `RUN@STEP`, or a checkpoint folder; absolute.
        out: the run folder.

    Raises:
        CheckpointError: there is no such checkpoint, or it is one of `out`, whose later ones would be in the way.
    """
    if resume in ("auto", "never"):
        return None
    whole = Path(resume)
    named, _, step = resume.rpartition("@")
    folder = _chosen(whole, None) if whole.exists() or not step.isdecimal() else _chosen(Path(named), int(step))
    if folder.parent.parent == out:
        raise CheckpointError(
            f"checkpoint.resume={resume}: a checkpoint of out={out} itself; give another out to go on from an earlier"
            " step, or checkpoint.resume=auto to go on from the newest"
        )
    return folder


def _chosen(named: Path, step: int | None) -> Path:
    """The checkpoint of a run, its newest without a `step`; or `named` itself, where that is one."""
    if step is None and (named / MANIFEST).is_file():
        return named
    saved = checkpoints_of(named)
    if not saved:
        raise CheckpointError(
            f"checkpoint.resume={named}: no run folder with checkpoints and no checkpoint; say auto, never, RUN,"
            " RUN@STEP or RUN/checkpoints/step-NUMBER"
        )
    if step is None:
        return saved[-1]
    if (folder := folder_of(named, step)) not in saved:
        steps = ", ".join(str(step_of(one)) for one in saved)
        raise CheckpointError(f"checkpoint.resume={named}@{step}: no checkpoint of that step; there are {steps}")
    return folder


def _read(frozen: Path) -> Mapping[str, Any]:
    try:
        held = yaml.safe_load(frozen.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{frozen}: not a configuration: {' '.join(str(error).split())}") from error
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{frozen}: not a configuration: expected a mapping of keys")
    return held


def _status(out: Path) -> str | None:
    summary = out / "summary.json"
    if not summary.is_file():
        return None
    try:
        status: str = json.loads(summary.read_text(encoding="utf-8"))["status"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{summary}: damaged, so it does not say how the run ended; remove it to go on"
        ) from error
    return status


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
