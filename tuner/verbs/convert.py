"""`tuner convert`: weights from elsewhere, as a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig

from tuner.errors import ConfigError
from tuner.models.config import ModelConfig
from tuner.models.gguf import convert as convert_gguf
from tuner.models.meta import convert_meta
from tuner.models.meta_config import PARAMS
from tuner.models.rewriting import rewrite
from tuner.results import GENERATION, require_free, whole
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.files import TOKENIZER_FILES

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Conversion = Callable[[Path, Path, torch.dtype | None], ModelConfig]


def convert(cfg: DictConfig, overrides: list[str]) -> str:
    """Write `dest`, which appears whole or not at all, and say what it is.

    Raises:
        TunerError: a `dest` that holds something, a source that is of no known kind, damaged or not supported, or no
            room.
    """
    source, dest = (Path(cfg[key]).expanduser().absolute() for key in ("source", "dest"))
    require_free(dest)
    kind, conversion = kind_of(source)
    with whole(dest) as unfinished:
        config = conversion(source, unfinished, DTYPES[cfg.dtype])
    return f"source: {kind}, model_type={config.model_type}\nconverted: {dest}"


def kind_of(source: Path) -> tuple[str, Conversion]:
    """What a source is, in words, and what converts it.

    Raises:
        ConfigError: nothing that is known, with what was looked for.
    """
    if source.is_file():
        with source.open("rb") as stream:
            if stream.read(4) == b"GGUF":
                return "GGUF", _from_gguf
    if (source / "config.json").is_file():
        return "Hugging Face folder", _from_hugging_face
    if (source / PARAMS).is_file():
        return "Meta checkpoint", _from_meta
    missing = "" if source.exists() else "does not exist; "
    raise ConfigError(
        f"source={source}: {missing}looked for a GGUF file (beginning with the bytes GGUF), a folder with config.json "
        f"(Hugging Face), a folder with {PARAMS} and consolidated.00.pth (Meta)"
    )


def _from_gguf(source: Path, folder: Path, dtype: torch.dtype | None) -> ModelConfig:
    return convert_gguf(source, folder, dtype or torch.float32)


def _from_meta(source: Path, folder: Path, dtype: torch.dtype | None) -> ModelConfig:
    config = convert_meta(source, folder, dtype)
    load_tokenizer(folder).save(folder)
    return config


def _from_hugging_face(source: Path, folder: Path, dtype: torch.dtype | None) -> ModelConfig:
    config = rewrite(source, folder, dtype)
    for name in (*TOKENIZER_FILES, GENERATION):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return config
