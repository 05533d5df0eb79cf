"""Tokenizers; `load_tokenizer` finds the module that reads the kind a folder holds."""

from __future__ import annotations

from pathlib import Path

from tuner.types import Tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        ModelError: saying what was looked for, if the folder holds none that is understood.
    """
    from tuner.tokenizers.huggingface import HuggingFaceTokenizer

    return HuggingFaceTokenizer(Path(folder).expanduser())
