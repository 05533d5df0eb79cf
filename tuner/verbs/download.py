"""`tuner download ORG/NAME [REVISION]`: a model of the Hugging Face Hub into the cache, for a run without a network."""

from __future__ import annotations

from tuner.models.hub import snapshot


def download(source: str, revision: str | None = None) -> str:
    """Where the snapshot is, and the words that choose exactly it.

    Raises:
        ConfigError: no such name is possible, or the extra `hub` is not installed.
        ModelError: the hub cannot be reached or does not give it, or there are no safetensors in it.
    """
    folder = snapshot(source, revision)
    return f"folder: {folder}\nuse: model.source={source} model.revision={folder.name}"
