"""The tokenizers that come with the package, for random weights: one for each way of the families to tokenize."""

from __future__ import annotations

from pathlib import Path

from tuner.tokenizers.small_byte_level import BYTE_LEVEL, write_byte_level
from tuner.tokenizers.small_sentencepiece import SENTENCEPIECE, write_sentencepiece
from tuner.tokenizers.tiny import write_tiny_tokenizer

SIZE = 512
"""Tokens of each, except `tiny`."""

KINDS = ("tiny", *SENTENCEPIECE, *BYTE_LEVEL)

VERSION = 1
"""Other content needs another number, since what is written is kept."""


def write_packaged_tokenizer(kind: str, folder: Path) -> None:
    """Write the files of a tokenizer as a Hugging Face folder holds them, the same bytes each time.

    Args:
        kind: one of `KINDS`.
        folder: made if it is not there.
    """
    if kind in SENTENCEPIECE:
        write_sentencepiece(kind, SIZE, folder)
    elif kind in BYTE_LEVEL:
        write_byte_level(kind, SIZE, folder)
    else:
        write_tiny_tokenizer(folder)
