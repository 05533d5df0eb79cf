"""What a finished run leaves for others: an adapter that PEFT loads, or a model that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import Tensor, nn

from tuner.errors import CheckpointError
from tuner.models.folder import read_config, save_weights
from tuner.models.llama import Llama
from tuner.peft.adapter_folder import has_adapter, save_adapter
from tuner.types import Summary, Tokenizer

GENERATION = "generation_config.json"
"""How the base's makers sample from it: transformers and servers read it."""


def finished_before(out: Path) -> Summary:
    """The summary of a run folder that has nothing left to do; says so."""
    text = (out / "summary.json").read_text(encoding="utf-8")
    names = {field.name for field in fields(Summary)}
    summary = Summary(**{key: value for key, value in json.loads(text).items() if key in names})
    print(f"{out} is finished already:\n{text}", end="")
    return summary


def results_bytes(model: nn.Module) -> int:
    """What `save_results` will write, its few kilobytes of text not counted."""
    saved = (p for p in model.parameters() if p.requires_grad or not has_adapter(model))
    return sum(p.numel() * p.element_size() for p in saved)


def save_results(model: nn.Module, tokenizer: Tokenizer, out: Path, *, facts: Mapping[str, Any]) -> list[Path]:
    """Write `adapter/` or, where all weights trained, `model/`; each appears whole.

    Args:
        model: trained.
        tokenizer: saved beside full weights.
        out: the run folder.
        facts: of the base while the adapter trained, so that it meets the same one again: `quantization` (name and
            keys) and `precision` (name).

    Returns:
        The folders written that are small enough to keep with a tracked run.
    """
    if not has_adapter(model):
        save_model(cast(Llama, model), tokenizer, out / "model")
        return []
    base = cast(Llama, model).config.path
    with _whole(out / "adapter") as unfinished:
        save_adapter(model, unfinished, base=base, extra={**facts, "run": str(out)})
    return [out / "adapter"]


def save_model(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face folder of plain weights: config, safetensors, tokenizer, the base's settings for generation.

    Raises:
        CheckpointError: no room on the disk.
    """
    original: dict[str, Any] = read_config(Path(model.config.path)) if model.config.path else {}
    with _whole(folder) as unfinished:
        save_weights(unfinished, {**original, **model.config.to_hugging_face()}, plain_tensors(model))
        tokenizer.save(unfinished)
        if model.config.path and (generation := Path(model.config.path) / GENERATION).is_file():
            shutil.copyfile(generation, unfinished / GENERATION)


def plain_tensors(model: Llama) -> dict[str, Tensor]:
    """The weights by checkpoint name, a tied head left out."""
    tensors = dict(model.state_dict())
    if model.tied:
        del tensors["lm_head.weight"]
    return tensors


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once everything is in it.

    Raises:
        CheckpointError: it cannot be written; nothing half-written is left.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
