"""Tokenizers; `load_tokenizer` finds the module that reads the kind a folder holds."""

from __future__ import annotations

from pathlib import Path

from tuner.errors import ModelError
from tuner.types import Tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder.

    `tokenizer.json` is read where there is one. Otherwise `tokenizer.model`, which is a sentencepiece model (Llama 2,
    Mistral, Gemma, Phi-3) or the list of tokens that Meta gives with Llama 3.

    Raises:
        ModelError: saying what was looked for, if the folder holds none that is understood.
    """
    folder = Path(folder).expanduser()
    if (folder / "tokenizer.json").is_file():
        from tuner.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(folder)
    file = folder / "tokenizer.model"
    if not file.is_file():
        what = (
            f"{folder} has no tokenizer.json and no tokenizer.model" if folder.is_dir() else f"{folder} is not a folder"
        )
        raise ModelError(f"{what}: a tokenizer is looked for in these (and in tokenizer_config.json beside them)")
    from tuner.tokenizers.tiktoken import TiktokenTokenizer, is_list_of_tokens

    if is_list_of_tokens(file):
        return TiktokenTokenizer(folder)
    from tuner.tokenizers.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files in `folder` that `load_tokenizer` would read."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
