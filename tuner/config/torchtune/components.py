"""What the dotted names after `_component_` mean here."""

from __future__ import annotations

import re
from typing import Any

from tuner.config.folder import options_of
from tuner.config.torchtune.answers import Answer

MODEL = re.compile(r"torchtune\.models\.(?P<family>\w+)(?:\.\w+)*?\.(?P<method>lora_|qlora_)?(?P<name>[a-z]\w*)")
PEFT = {None: "full", "lora_": "lora", "qlora_": "qlora"}
FAMILIES = {
    "llama2": "llama",
    "code_llama2": "llama",
    "llama3": "llama",
    "llama3_1": "llama",
    "llama3_2": "llama",
    "llama3_3": "llama",
    "mistral": "mistral",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_5": "qwen2",
    "qwen3": "qwen3",
}
"""Which family of ours reads the folders of a package below torchtune.models."""

SAME_SHAPE = {"qwen2_5_0_5b": "qwen2_0_5b", "qwen2_5_1_5b": "qwen2_1_5b", "qwen2_5_7b": "qwen2_7b"}
NO_MODEL = ("classifier", "reward", "moe", "vision", "clip")
"""Builders of a language model's family that build something else."""

OPTIMIZERS = {
    "torch.optim.AdamW": "adamw",
    "torch.optim.SGD": "sgd",
    "torch.optim.Adafactor": "adafactor",
    "torch.optim.Muon": "muon",
    "bitsandbytes.optim.Adam8bit": "adam8bit",
    "bitsandbytes.optim.AdamW8bit": "adamw8bit",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw8bit",
    "bitsandbytes.optim.Lion8bit": "lion8bit",
    "bitsandbytes.optim.PagedLion8bit": "paged_lion8bit",
    "bitsandbytes.optim.AdEMAMix8bit": "ademamix8bit",
    "bitsandbytes.optim.PagedAdEMAMix8bit": "paged_ademamix8bit",
    "torchao.optim.AdamW8bit": "adamw8bit",
    "torchao.prototype.low_bit_optim.AdamW8bit": "adamw8bit",
}
TORCHAO = "bitsandbytes' and not torchao's: state of 8 bits too, rounded otherwise"
NOTES = {
    "torch.optim.Muon": "with AdamW for what is no matrix, which Muon refuses; "
    "adjust_lr_fn=original is its size of steps",
    "torchao.optim.AdamW8bit": TORCHAO,
    "torchao.prototype.low_bit_optim.AdamW8bit": TORCHAO,
}
"""What is not the very same."""

OFFLOADED = ("torchao.optim.CPUOffloadOptimizer", "torchao.prototype.low_bit_optim.CPUOffloadOptimizer")
"""An optimizer around another one, which is AdamW where nothing is said."""

LOGGERS = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow"}
FILES_ONLY = ("DiskLogger", "StdoutLogger")
CROSS_ENTROPIES = ("CEWithChunkedOutputLoss", "LinearCrossEntropyLoss", "CrossEntropyLoss")
CHECKPOINTERS = ("FullModelHFCheckpointer", "FullModelTorchTuneCheckpointer", "FullModelMetaCheckpointer")


def model(value: Any) -> Answer:
    """`torchtune.models.llama2.qlora_llama2_7b`: the model, and how it is trained."""
    found = MODEL.fullmatch(str(value))
    if found is None or found["family"] not in FAMILIES or any(part in found["name"] for part in NO_MODEL):
        return Answer(
            note="no such model here; `tuner ls model` lists those there are, language models alone", lost=True
        )
    method = ("peft", PEFT[found["method"]])
    name = model_name(found["name"])
    if name is None:
        return Answer(
            (("model", FAMILIES[found["family"]]), method),
            "no config for this size; the shape comes from its Hugging Face folder, model.path=FOLDER",
            lost=True,
        )
    return Answer((("model", name), method))


def model_name(name: str) -> str | None:
    """Our config of a model that torchtune calls `name`, None where there is none."""
    name = re.sub(r"_(base|instruct)$", "", name)
    name = SAME_SHAPE.get(name, name)
    return name if name in options_of("model") - set(FAMILIES.values()) else None


def optimizer(value: Any) -> Answer:
    """A class of ours by its short name; any other is built by its dotted name."""
    target = str(value)
    if target in OPTIMIZERS:
        return Answer((("optimizer", OPTIMIZERS[target]),), NOTES.get(target, ""))
    if target in OFFLOADED:
        note = "AdamW, as there; any other optimizer can be offloaded too"
        return Answer((("optimizer", "adamw"), ("memory.offload_optimizer", True)), note)
    words: tuple[tuple[str, Any], ...] = (("optimizer", "custom"), ("optimizer._target_", target))
    module = target.rpartition(".")[0]
    if module not in ("torch.optim", "bitsandbytes.optim"):
        words += (("trust_targets", [target.partition(".")[0]]),)
        return Answer(words, "its package has to be installed, and one that steps one optimizer over all weights")
    return Answer(words)


def offload_gradients(value: Any) -> Answer:
    """An argument of the classes in `OFFLOADED`."""
    if value is True:
        note = "each gradient leaves in backward, where its parameter is then stepped"
        return Answer((("memory.optimizer_in_bwd", True),), note)
    return Answer(note="gradients are on the GPU until the step, here too")


def dataset(value: Any) -> Answer:
    """The builders of torchtune.datasets; what has columns of its own is named by those, or brought as messages."""
    name = _last(value)
    if name in ("alpaca_dataset", "alpaca_cleaned_dataset"):
        return Answer((("data", "alpaca"),), "from a local file, data.path=FILE")
    if name == "chat_dataset":
        return Answer((("data", "messages"),), "from a local file, data.path=FILE")
    if name == "instruct_dataset":
        words = (("data", "instruct"), ("data.prompt_column", "input"), ("data.response_column", "output"))
        return Answer(words, "its columns, unless column_map names others; from a local file, data.path=FILE")
    if name == "text_completion_dataset":
        return Answer((("data", "text"),), "from a local file, data.path=FILE; its `column` is data.text_column")
    layout = '{"messages": [{"role": ..., "content": ...}, ...]}'
    return Answer((("data", "messages"),), f"no reader of its rows: bring them as JSON lines of {layout}", lost=True)


def schedule(value: Any) -> Answer:
    """The learning rate's way."""
    if _last(value) == "get_cosine_schedule_with_warmup":
        return Answer((("schedule", "cosine"),))
    return Answer((("schedule", "cosine"),), "no such schedule; there are cosine, linear and constant", lost=True)


def logger(value: Any) -> Answer:
    """Where metrics go besides the terminal and the run folder."""
    name = _last(value)
    if name in FILES_ONLY:
        return Answer((("logger", "none"),), "terminal and metrics.jsonl are always on")
    if name in LOGGERS:
        return Answer((("logger", LOGGERS[name]),))
    return Answer((("logger", "none"),), "no such logger; there are mlflow, tensorboard and wandb", lost=True)


def loss(value: Any) -> Answer:
    """Cross-entropy, which is what there is."""
    if _last(value) in CROSS_ENTROPIES:
        return Answer(note="cross-entropy in chunks, which never makes the whole logits, is the loss here")
    return Answer(note="the loss is cross-entropy over the trained tokens; no other can be chosen", lost=True)


def checkpointer(value: Any) -> Answer:
    """The layout of the folder, which is read from the folder here."""
    if _last(value) == "FullModelMetaCheckpointer":
        return Answer(note="Meta's files are converted once: python -m tuner convert source=FOLDER dest=NEW")
    if _last(value) in CHECKPOINTERS:
        return Answer(note="the layout is found by looking: safetensors or .bin in a Hugging Face folder")
    return Answer(note="no such layout; model.path is a Hugging Face folder", lost=True)


def _last(value: Any) -> str:
    return str(value).rpartition(".")[2]
