"""What a run leaves for others: an adapter that PEFT loads, a model that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tuner.checkpoint.folder import flush
from tuner.errors import CheckpointError, ConfigError
from tuner.models.decoder import Decoder
from tuner.models.folder import read_config
from tuner.models.stored import Part, Unmade, stored_parts
from tuner.models.tensor_file import bytes_of
from tuner.models.writing import save_weights, write_json
from tuner.peft.adapter_folder import has_adapter
from tuner.peft.adapter_writing import save_adapter
from tuner.peft.merge import plain_parameter, unties
from tuner.peft.residual import ResidualAdapter
from tuner.peft.token_rows import row_layers
from tuner.tokenizers.files import read_json, write_chat_template
from tuner.types import Summary, Tokenizer

GENERATION = "generation_config.json"
"""How the base's makers sample from it: transformers and servers read it."""


@dataclass(frozen=True)
class Kept:
    """Which results are written.

    Attributes:
        adapter: `adapter/`, where there is one.
        merged: `model/`, with the adapter merged in where there is one.
    """

    adapter: bool
    merged: bool


def finished_before(out: Path) -> Summary:
    """The summary of a run folder that has nothing left to do; says so."""
    text = (out / "summary.json").read_text(encoding="utf-8")
    names = {field.name for field in fields(Summary)}
    summary = Summary(**{key: value for key, value in json.loads(text).items() if key in names})
    print(f"{out} is finished already:\n{text}", end="")
    return summary


def results_bytes(model: Decoder, kept: Kept, epoch_ends: int) -> int:
    """What `save_results` will write at the end and at earlier ends of epochs, a few kilobytes of text not counted.

    Args:
        model: newly made.
        kept: which results.
        epoch_ends: how many there will be before the last step.
    """
    if not has_adapter(model):
        return (1 + epoch_ends * kept.merged) * _plain_bytes(model)
    saved = [p.data for p in model.parameters() if p.requires_grad]
    saved += [b for module in model.modules() if isinstance(module, ResidualAdapter) for b in module.buffers()]
    adapter = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    return (1 + epoch_ends) * (kept.adapter * adapter + kept.merged * _plain_bytes(model))


def _plain_bytes(model: Decoder) -> int:
    return sum(bytes_of(part.dtype, tuple(part.shape)) for parts in plain_tensors(model).values() for part in parts)


def facts_of_base(quantization: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """What the base of an adapter is while it trains, so that it meets the same one again.

    Args:
        quantization: the member of that group, `_target_` and keys.
        precision: the name of what was computed in.
    """
    keys = {key: value for key, value in quantization.items() if not key.startswith("_")}
    return {"quantization": {"name": str(quantization["_target_"]).split(".")[-2], **keys}, "precision": precision}


def save_results(
    model: Decoder, tokenizer: Tokenizer, folder: Path, kept: Kept, *, facts: Mapping[str, Any], run: Path
) -> None:
    """Write `adapter/` and `model/` as far as they are kept; each appears whole.

    The model computes and trains afterwards as it did.

    Args:
        model: trained.
        tokenizer: saved beside weights, and beside an adapter with rows of tokens.
        folder: gets them: the run folder, or one of an epoch.
        kept: which.
        facts: of the base, from `facts_of_base`.
        run: the run folder, for the record.
    """
    if kept.adapter:
        save_adapter_folder(model, tokenizer, folder / "adapter", facts=facts, run=run)
    if kept.merged:
        save_model(model, tokenizer, folder / "model")


def save_adapter_folder(
    model: Decoder, tokenizer: Tokenizer, folder: Path, *, facts: Mapping[str, Any], run: Path
) -> None:
    """An adapter as Hugging Face PEFT loads it, with what it needs of the tokenizer.

    Raises:
        CheckpointError: no room on the disk.
    """
    config = model.config
    base = config.source or config.path  # a name finds its base on any machine, a folder on this one
    with whole(folder) as unfinished:
        save_adapter(model, unfinished, base=base, revision=config.revision, extra={**facts, "run": str(run)})
        if next(row_layers(model), None) is not None:
            save_vocabulary(tokenizer, unfinished)
        elif tokenizer.chosen_template is not None:
            write_chat_template(unfinished, tokenizer.chosen_template)


def save_vocabulary(tokenizer: Tokenizer, folder: Path) -> None:
    """A tokenizer beside an adapter, which knows the tokens whose rows are in it, and what ends a text.

    There is no config.json there: a folder with one would be a model.
    """
    tokenizer.save(folder)
    ends = tokenizer.end_ids if tokenizer.chosen_template is None else tokenizer.reply_end_ids
    write_json(folder / GENERATION, {"eos_token_id": sorted(ends)})


def plain_twin(model: Decoder) -> Decoder:
    """The model without adapters and packed layers, on the meta device: the names and shapes of its parameters."""
    config = replace(model.config, tie_word_embeddings=False) if unties(model) else model.config
    with torch.device("meta"):
        return config.build()


def plain_tensors(model: Decoder) -> dict[str, tuple[Part, ...]]:
    """What a Hugging Face folder of the model holds, its adapter merged in, each made when it is written."""
    twin, dtype = plain_twin(model), model.model.embed_tokens.weight.dtype
    shapes = {name: parameter.shape for name, parameter in twin.named_parameters()}
    return {
        stored: tuple(Unmade(shapes[part], dtype, partial(plain_parameter, model, part, dtype)) for part in parts)
        for stored, parts in stored_parts(twin).items()
    }


def save_model(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face folder of plain weights: config, safetensors, tokenizer, the base's settings for generation.

    An adapter is merged into the weights that are written, tensor by tensor, and not into the model.

    Raises:
        CheckpointError: no room on the disk.
    """
    original: dict[str, Any] = read_config(Path(model.config.path)) if model.config.path else {}
    with whole(folder) as unfinished:
        written = {**original, **plain_twin(model).config.to_hugging_face()}
        save_weights(unfinished, written, plain_tensors(model))
        tokenizer.save(unfinished)
        if model.config.path and (generation := Path(model.config.path) / GENERATION).is_file():
            shutil.copyfile(generation, unfinished / GENERATION)
        if tokenizer.chosen_template is not None:  # its replies may end with another token than the base's
            settings = read_json(unfinished / GENERATION)
            write_json(unfinished / GENERATION, {**settings, "eos_token_id": sorted(tokenizer.reply_end_ids)})


def require_free(dest: Path) -> None:
    """Raises ConfigError for a folder to be written that is there and holds something."""
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ConfigError(f"dest={dest} exists and is not empty")


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once everything is in it.

    Raises:
        CheckpointError: it cannot be written; nothing half-written is left.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in [*unfinished.iterdir(), unfinished]:  # a checkpoint that follows says that this is there
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
