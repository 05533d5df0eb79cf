"""One commit for each model and dataset of the Hugging Face Hub in a sweep, found before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from omegaconf import DictConfig

import tuner
from sweeper.folder import SweepFolder
from sweeper.plan import Trial
from sweeper.trial import CONFIG
from tuner.errors import IllegalCombination

GROUPS = ("model", "data")
"""Those with a `source` and a `revision`."""

Commits = dict[tuple[str, str, str | None], str]
"""By group, source and what the words call the revision."""


def pinned(trials: Sequence[Trial], folder: SweepFolder) -> list[Trial]:
    """The trials, those with a `model.source` or `data.source` with its commit in their words and configurations.

    Trials whose folders are there keep their commits, and new ones of the same names take them: a sweep that is
    continued after `main` moved still compares runs on the same weights and rows.

    Raises:
        TunerError: the hub cannot be reached or does not give it.
    """
    commits: Commits = {}
    begun = {one.id: (folder.out(one.id) / CONFIG).is_file() for one in trials}
    done = {
        one.id: _pinned(one, folder, begun[one.id], commits) for one in sorted(trials, key=lambda t: not begun[t.id])
    }
    return [done[one.id] for one in trials]


def _pinned(one: Trial, folder: SweepFolder, begun: bool, commits: Commits) -> Trial:
    if one.config is None or one.illegal is not None:
        return one
    asked = {
        group: (group, node.source, node.revision) for group in GROUPS if (node := one.config[group]).get("source")
    }
    if not asked:
        return one
    if not commits.keys() >= set(asked.values()):
        config = one.config.copy()
        config.out = str(folder.out(one.id))
        for group, name in asked.items():  # null: the commit of the folder
            config[group].revision = commits.get(name, None if begun else config[group].revision)
        frozen = tuner.freeze(config)
        commits |= {name: frozen[group].revision for group, name in asked.items()}
    config = one.config.copy()
    for group, name in asked.items():
        config[group].revision = commits[name]
    words = [f"{group}.revision={commits[name]}" for group, name in asked.items()]
    return replace(one, config=config, words=[*one.words, *words], illegal=_illegal(config))


def _illegal(config: DictConfig) -> str | None:
    """What the rules say now that the model's shape is known."""
    try:
        tuner.check(config)
    except IllegalCombination as error:
        return "; ".join(error.problems)
    return None
