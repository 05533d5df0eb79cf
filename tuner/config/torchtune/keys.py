"""The table: each of torchtune's keys for training on one device, and how its value reads here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tuner.config.torchtune import components
from tuner.config.torchtune.answers import Answer, Reading, absent, chosen, holds, only, same

CONTEXT = "${model.max_position_embeddings}"
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){2,}")


def epochs(value: Any) -> Answer:
    """A run's length is epochs or steps, the other being null."""
    return Answer((("train.epochs", value), ("train.max_steps", None)))


def max_steps_per_epoch(value: Any) -> Answer:
    if value is None:
        return Answer(note="null there: the length is train.epochs")
    note = "optimizer steps of the whole run, so times the epochs"
    return Answer((("train.max_steps", value), ("train.epochs", None)), note)


def max_seq_len(value: Any) -> Answer:
    if value is None:
        return Answer((("data.max_seq_len", CONTEXT),), "no limit there: the model's context")
    return Answer((("data.max_seq_len", value),))


def packed(value: Any) -> Answer:
    """Rows are as long as a sample may be, there and here."""
    return Answer((("data.packing", "pack"),)) if value is True else Answer(note="data.packing=none is the default")


def resume(value: Any) -> Answer:
    """Resuming is what the same `out` does."""
    if value is True:
        note = "the same command with out=FOLDER, the run folder, goes on (checkpoint.resume=auto is the default)"
        return Answer(note=note, lost=True)
    return Answer(note="a new out is a new run; on one that is not finished the same command goes on")


def clip_grad_norm(value: Any) -> Answer:
    if str(value) in ("inf", ".inf"):
        return Answer((("train.clip_grad_norm", None),), "the norm is logged in any case")
    return Answer((("train.clip_grad_norm", value),))


def device(value: Any) -> Answer:
    name, _, index = str(value).partition(":")
    if name not in ("cpu", "cuda"):
        return Answer(note="no such device; it is auto, cpu or cuda", lost=True)
    note = f"which GPU: CUDA_VISIBLE_DEVICES={index} before the command" if index else ""
    return Answer((("device", name),), note)


def deterministic_mode(value: Any) -> Answer:
    """PyTorch's deterministic debug mode there: default, warn or error, or the numbers 0 to 2."""
    if value in (None, False, 0, "default"):
        return Answer(note="off here too")
    return Answer((("train.deterministic", True),))


def quantize_base(value: Any) -> Answer:
    return Answer((("peft", "qlora"),)) if value is True else Answer(note="dense, as peft=lora is")


def use_dora(value: Any) -> Answer:
    if value is True:
        return Answer((("peft", "dora"),), "over a base in 4 bits say quantization=nf4 too")
    return Answer(note="not used, as peft=lora does not")


def adapter_checkpoint(value: Any) -> Answer:
    if value is None:
        return Answer(note="nothing to start from")
    return Answer(note="to go on from an adapter say adapter=FOLDER, one in PEFT's layout", lost=True)


def recipe_checkpoint(value: Any) -> Answer:
    return Answer(note="nothing to resume") if value is None else resume(True)


def save_adapter_weights_only(value: Any) -> Answer:
    """Off there, each epoch has the merged weights beside the adapter."""
    if value is True:
        return Answer((("checkpoint.save_merged", False),), "the default; `tuner export` merges any checkpoint later")
    return Answer((("checkpoint.save_merged", True),), "model/ beside adapter/, for each epoch")


def source(value: Any) -> Answer:
    """What torchtune gives to load_dataset: a kind of file, or a dataset of the hub."""
    if value in ("json", "jsonl"):
        return Answer(note="JSON, in lines or as one array, is what data.path reads")
    if value in ("csv", "parquet"):
        return Answer(note=f".{value} files are what data.path reads")
    if value == "text":
        return Answer(note="no reader of text files: bring them as JSON lines and say data=text", lost=True)
    return Answer(note=f"say data.source={value}, or data.path=FILE for a local copy", lost=True)


def train_on_input(value: Any) -> Answer:
    if value is True:
        return Answer((("data.train_on", "all"),))
    return Answer(note="the loss is on the replies alone")


def data_files(value: Any) -> Answer:
    files = value if isinstance(value, list) else [value]
    if len(files) != 1 or not isinstance(files[0], str):
        return Answer(note="data.path is one file, a folder or a pattern: say which holds them", lost=True)
    return Answer((("data.path", files[0]),))


KEYS: Mapping[str, Reading] = {
    # The run
    "output_dir": same("out"),
    "seed": same("seed"),
    "device": device,
    "dtype": chosen(
        "precision", {"bf16": "bf16", "fp32": "fp32"}, "precision is bf16 or fp32, or amp_fp16 over fp32 weights"
    ),
    "resume_from_checkpoint": resume,
    "epochs": epochs,
    "max_steps_per_epoch": max_steps_per_epoch,
    "batch_size": same("train.batch_size"),
    "gradient_accumulation_steps": same("train.gradient_accumulation_steps"),
    "clip_grad_norm": clip_grad_norm,
    "compile": same("train.compile"),
    "shuffle": only((True, None), "always: the order is a function of the seed", "the order is always shuffled"),
    "cudnn_deterministic_mode": deterministic_mode,
    # Model and method
    "model._component_": components.model,
    "model.lora_attn_modules": same("peft.lora_attn_modules"),
    "model.apply_lora_to_mlp": same("peft.apply_lora_to_mlp"),
    "model.apply_lora_to_output": same("peft.apply_lora_to_output"),
    "model.lora_rank": same("peft.lora_rank"),
    "model.lora_alpha": same("peft.lora_alpha"),
    "model.lora_dropout": same("peft.lora_dropout"),
    "model.quantize_base": quantize_base,
    "model.use_dora": use_dora,
    "model.max_seq_len": holds("a model's context is that of its folder; of the data it is data.max_seq_len"),
    # Weights and tokenizer
    "checkpointer._component_": components.checkpointer,
    "checkpointer.checkpoint_dir": same("model.path"),
    "checkpointer.checkpoint_files": holds("a folder is read whole"),
    "checkpointer.model_type": holds("the family is read from the folder's config.json"),
    "checkpointer.output_dir": same("out"),
    "checkpointer.adapter_checkpoint": adapter_checkpoint,
    "checkpointer.recipe_checkpoint": recipe_checkpoint,
    "checkpointer.safe_serialization": only((True, None), "safetensors", "weights are written as safetensors"),
    "checkpointer.keep_last_n_checkpoints": same("checkpoint.keep_last"),
    "save_adapter_weights_only": save_adapter_weights_only,
    "save_every_n_steps": same("checkpoint.every_steps"),
    "enable_async_checkpointing": same("checkpoint.asynchronous"),
    "tokenizer._component_": holds("the tokenizer is that of the model's folder"),
    "tokenizer.path": holds("the tokenizer is that of the model's folder"),
    "tokenizer.merges_file": holds("the tokenizer is that of the model's folder"),
    "tokenizer.max_seq_len": max_seq_len,
    "tokenizer.prompt_template": absent("the chat template is that of the model's folder, or model.chat_template=NAME"),
    # Data
    "dataset._component_": components.dataset,
    "dataset.source": source,
    "dataset.data_files": data_files,
    "dataset.split": only(("train", None), "data.split's default", "a slice is no split: say data.max_samples=N"),
    "dataset.packed": packed,
    "dataset.max_seq_len": max_seq_len,
    "dataset.train_on_input": train_on_input,
    "dataset.column_map": absent("each column is a key, as data.output_column=NAME or data.response_column=NAME"),
    "dataset.conversation_column": only(("messages",), "as in data=messages", "say data.messages_column=NAME"),
    "dataset.conversation_style": only(("openai",), "as in data=messages", "say data=sharegpt for from and value"),
    "dataset.new_system_prompt": absent("no key: put a system message at the head of each conversation"),
    "dataset_val.*": absent("validation is data.val_fraction of the data, or data.val_path or data.val_split"),
    "run_val_every_n_steps": same("train.val_every_steps"),
    "batch_size_val": holds("evaluations use train.batch_size"),
    "max_validation_batches": absent("data.max_val_samples=N counts samples, not batches"),
    "collate_fn": absent("a batch is padded to its longest sample"),
    # Optimizer, schedule, loss
    "optimizer._component_": components.optimizer,
    "optimizer.lr": same("optimizer.lr"),
    "optimizer.weight_decay": same("optimizer.weight_decay"),
    "optimizer.betas": same("optimizer.betas"),
    "optimizer.eps": same("optimizer.eps"),
    "optimizer.momentum": same("optimizer.momentum"),
    "optimizer.nesterov": same("optimizer.nesterov"),
    "optimizer.fused": same("optimizer.fused"),
    "optimizer.offload_gradients": components.offload_gradients,
    "optimizer.minimal_size": holds("of torchao's offloading: here small parameters are stepped on the host too"),
    "lr_scheduler._component_": components.schedule,
    "lr_scheduler.num_warmup_steps": same("schedule.warmup_steps"),
    "lr_scheduler.num_cycles": only((0.5, None), "half a cosine", "the cosine is half a wave"),
    "loss._component_": components.loss,
    "loss.num_output_chunks": holds("the size of a chunk is fixed"),
    "loss.ignore_index": holds("what is not trained on is left out before the loss"),
    # Memory
    "enable_activation_checkpointing": chosen(
        "memory.activation_checkpointing", {True: "full", False: "none"}, "true or false there; none or full here"
    ),
    "enable_activation_offloading": same("memory.activation_offloading"),
    "optimizer_in_bwd": same("memory.optimizer_in_bwd"),
    # Logging
    "metric_logger._component_": components.logger,
    "metric_logger.log_dir": holds("logs lie in the run folder"),
    "metric_logger.filename": holds("the file is metrics.jsonl in the run folder"),
    "metric_logger.project": same("logger.project"),
    "metric_logger.entity": same("logger.entity"),
    "metric_logger.name": same("logger.run_name"),
    "metric_logger.run_name": same("logger.run_name"),
    "metric_logger.tags": same("logger.tags"),
    "metric_logger.mode": same("logger.mode"),
    "metric_logger.experiment_name": same("logger.experiment"),
    "metric_logger.tracking_uri": same("logger.tracking_uri"),
    "metric_logger.group": absent("no groups: logger.tags, or a sweep, keeps runs together"),
    "metric_logger.organize_logs": holds("each run has a folder of its own"),
    "log_every_n_steps": same("train.log_every_steps"),
    "log_peak_memory_stats": holds("always: in metrics.jsonl and summary.json"),
    "log_level": absent("no levels: what is printed is also in run.log"),
    "profiler.*": absent("no profiler: perf/tokens_per_s and memory/peak_mib are logged"),
}
"""Keys in dotted form; one that ends in `.*` is asked for every key below it that has no row of its own."""

LEAVES = ("dataset.column_map", "checkpointer.checkpoint_files", "dataset.data_files")
"""Keys whose value may be a container."""

COMPONENTS = [key.removesuffix("._component_") for key in KEYS if key.endswith("._component_")]
"""Groups of keys that are built from a dotted name."""


def answer(key: str, value: Any) -> Answer | None:
    """What one of torchtune's keys with a value means here, None for a key that is not in the table.

    Args:
        key: dotted; `metric_logger=torchtune....WandBLogger` is `metric_logger._component_`.
        value: as its YAML holds it.
    """
    if key in COMPONENTS and isinstance(value, str) and DOTTED.fullmatch(value):
        key = f"{key}._component_"
    row = row_of(key)
    return KEYS[row](value) if row is not None else None


def row_of(key: str) -> str | None:
    """The row of `KEYS` that reads a key."""
    if key in KEYS:
        return key
    below = f"{key.partition('.')[0]}.*"
    return below if below in KEYS else None
