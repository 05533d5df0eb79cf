"""The Hugging Face Hub as far as a configuration needs it: which commit a name means, and what is cached of it.

At the bottom, because both need it: `tuner.config` pins the commit when a configuration is frozen, and
`tuner.models.hub` and `tuner.data.hub` read what is pinned. `huggingface_hub` is the extra `hub` and imported where it
is used.

That library falls back to what it has cached when the hub does not answer. Here that is an error: a run would train on
other weights or data than were asked for. `HF_HUB_OFFLINE=1` is how a person says that the cached ones are meant.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from tuner.errors import ModelError
from tuner.hub_errors import DATASET, hub_errors

MAIN = "main"
"""The revision that is meant where none is said."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Of these a repository needs one: the weights in one file, or the index of many."""

COMMIT = re.compile(r"[0-9a-f]{40}")
ANSWER_S = 30.0
"""How long to wait for the hub to answer."""


def is_commit(revision: object) -> bool:
    """Whether this is the full hash of a commit, which means the same for ever."""
    return isinstance(revision, str) and COMMIT.fullmatch(revision) is not None


def pinned(source: str, revision: str | None) -> str:
    """The commit that a revision of a model names now, with its `config.json` in the cache.

    The file is fetched too because the hub describes a gated repository to everyone and gives its files to few: so a
    sweep without access is refused when it is submitted. A commit whose file is cached costs no request.

    Args:
        source: ORG/NAME.
        revision: a branch, a tag or a commit; None is `main`.

    Raises:
        ConfigError: no such name is possible, or the extra `hub` is not installed.
        ModelError: the hub cannot be reached or does not give it, or there are no safetensors in it.
    """
    asked = MAIN if revision is None else revision
    if is_commit(asked) and cached_config(source, asked) is not None:
        return asked
    with hub_errors(source, asked):
        from huggingface_hub import hf_hub_download

        require_reachable(source, asked)
        return Path(hf_hub_download(source, "config.json", revision=asked)).parent.name


def pinned_dataset(source: str, revision: str | None) -> str:
    """The commit that a revision of a dataset names now; a commit is taken at its word and costs no request.

    Its card, the README.md, is fetched too, which the library `datasets` would do anyway: with it in the cache,
    `HF_HUB_OFFLINE=1` finds the commit that a branch last named.

    Args:
        source: ORG/NAME.
        revision: a branch, a tag or a commit; None is `main`.

    Raises:
        ConfigError: no such name is possible, or the extra `datasets` is not installed.
        DataError: the hub cannot be reached or does not give it.
    """
    asked = MAIN if revision is None else revision
    if is_commit(asked):
        return asked
    with hub_errors(source, asked, DATASET):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.constants import is_offline_mode
        from huggingface_hub.errors import RemoteEntryNotFoundError

        commit = None if is_offline_mode() else reachable_dataset(source, asked)
        try:
            card = hf_hub_download(source, "README.md", repo_type="dataset", revision=asked)
        except RemoteEntryNotFoundError:  # it has none
            assert commit is not None, "only the hub itself can say so"
            return commit
        return Path(card).parent.name


def reachable_dataset(source: str, revision: str) -> str:
    """Ask the hub which commit a dataset's revision is, and whether its files may be had.

    Raises:
        ConfigError, DataError: as `pinned_dataset`; `HF_HUB_OFFLINE` forbids to ask.
    """
    with hub_errors(source, revision, DATASET):
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(source, revision=revision, timeout=ANSWER_S).sha
        HfApi().auth_check(source, repo_type="dataset")  # a gated one is described to everyone
        return str(commit)


def cached_config(source: str, revision: str | None) -> Path | None:
    """The `config.json` of a snapshot, where it is in the cache; asks nobody.

    Raises:
        ConfigError: as `pinned`.
    """
    with hub_errors(source, revision or MAIN):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source, "config.json", revision=revision or MAIN)
    return Path(found) if isinstance(found, str) else None


def require_reachable(source: str, revision: str) -> None:
    """Ask the hub for a revision, unless `HF_HUB_OFFLINE` says that the cache is meant; inside of `hub_errors`.

    Raises:
        ModelError: there are no safetensors in it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    if not is_offline_mode():
        files = HfApi().model_info(source, revision=revision, timeout=ANSWER_S).siblings or []
        _require_safetensors(source, revision, [file.rfilename for file in files])


def _require_safetensors(source: str, revision: str, files: Collection[str]) -> None:
    if not set(WEIGHTS) & set(files):
        others = [name for name in files if name.endswith((".bin", ".pth", ".pt", ".gguf", ".safetensors", ".h5"))]
        raise ModelError(
            f"model.source={source} model.revision={revision}: neither {' nor '.join(WEIGHTS)} in this repository (its "
            f"weights: {', '.join(others[:3]) or 'none'}), and no other file of weights is downloaded; take a "
            "repository with safetensors, or convert this one yourself and say model.path=FOLDER"
        )
