"""A model of the Hugging Face Hub as a folder in `huggingface_hub`'s own cache, which other tools read and fill too.

Only data is downloaded: safetensors and JSON, the tokenizer's files and its chat template. Not Python code, and not
`.bin`, `.pth` or `.gguf`: a pickle runs code when it is read.
"""

from __future__ import annotations

from pathlib import Path

from tuner.errors import ModelError
from tuner.hub import WEIGHTS, cached_config, pinned, require_reachable
from tuner.hub_errors import hub_errors

WANTED = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
UNWANTED = ("*/*", "consolidated*.safetensors")
"""Exports for other programs in folders of their own, and Mistral's second copy of all weights under its own names."""


def snapshot(source: str, revision: str | None) -> Path:
    """The folder of one commit, downloaded as far as it is not in the cache; named by the commit's hash.

    A commit that is cached whole costs no request. Safe when several processes ask at once: `huggingface_hub` locks
    each file and renames it into place.

    Args:
        source: ORG/NAME.
        revision: a branch, a tag or a commit; None is `main`.

    Raises:
        ConfigError: no such name is possible, or the extra `hub` is not installed.
        ModelError: the hub cannot be reached or does not give it, there are no safetensors in it, or the download broke
            off, which the next call completes.
    """
    commit = pinned(source, revision)
    with hub_errors(source, commit):
        from huggingface_hub import snapshot_download

        if not _listed(source, commit):
            require_reachable(source, commit)  # unlisted and unreached, it would be taken for whole as it is
        folder = snapshot_download(source, revision=commit, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
    _require_weights(Path(folder), source, commit)
    return Path(folder)


def cached_folder(source: str, revision: str | None) -> Path | None:
    """The snapshot's folder where at least its `config.json` is cached; asks nobody.

    Raises:
        ConfigError: as `snapshot`.
    """
    config = cached_config(source, revision)
    return config and config.parent


def _listed(source: str, commit: str) -> bool:
    """Whether the cache knows every file of this commit and so can tell a whole snapshot from a part of one."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        get_cached_repo_tree(source, revision=commit)
    except CachedRepoTreeNotFoundError:
        return False
    return True


def _require_weights(folder: Path, source: str, commit: str) -> None:
    """Refuse the part of a snapshot that an offline cache of unknown files may be."""
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ModelError(
            f"model.source={source} model.revision={commit}: no weights in the cache, {folder}, and HF_HUB_OFFLINE=1 "
            "forbids to download them; unset it once"
        )
