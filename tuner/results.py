"""What a finished run leaves for others: an adapter that PEFT loads, or a model that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from tuner.models.folder import read_config, save_weights
from tuner.models.llama import Llama
from tuner.peft.adapter_folder import has_adapter, save_adapter
from tuner.types import Summary, Tokenizer


def finished_before(out: Path) -> Summary:
    """The summary of a run folder that has nothing left to do; says so."""
    text = (out / "summary.json").read_text(encoding="utf-8")
    names = {field.name for field in fields(Summary)}
    summary = Summary(**{key: value for key, value in json.loads(text).items() if key in names})
    print(f"{out} is finished already:\n{text}", end="")
    return summary


def save_results(model: nn.Module, tokenizer: Tokenizer, out: Path, *, quantization: Mapping[str, Any]) -> list[Path]:
    """Write `adapter/` or, where all weights trained, `model/`; each appears whole.

    Args:
        model: trained.
        tokenizer: saved beside full weights.
        out: the run folder.
        quantization: name and keys of what the base was quantized to while the adapter trained.

    Returns:
        The folders written that are small enough to keep with a tracked run.
    """
    if not has_adapter(model):
        save_model(cast(Llama, model), tokenizer, out / "model")
        return []
    unfinished = _empty(out / ".adapter.unfinished")
    base = cast(Llama, model).config.path
    save_adapter(model, unfinished, base=base, extra={"quantization": dict(quantization), "run": str(out)})
    return [_in_place(unfinished, out / "adapter")]


def save_model(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face folder of plain weights: config, safetensors, tokenizer.

    Raises:
        CheckpointError: no room on the disk.
    """
    unfinished = _empty(folder.with_name(f".{folder.name}.unfinished"))
    original: dict[str, Any] = read_config(Path(model.config.path)) if model.config.path else {}
    save_weights(unfinished, {**original, **model.config.to_hugging_face()}, plain_tensors(model))
    tokenizer.save(unfinished)
    _in_place(unfinished, folder)


def plain_tensors(model: Llama) -> dict[str, Tensor]:
    """The weights by checkpoint name, a tied head left out."""
    tensors = dict(model.state_dict())
    if model.tied:
        del tensors["lm_head.weight"]
    return tensors


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _in_place(unfinished: Path, folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    return unfinished.rename(folder)
