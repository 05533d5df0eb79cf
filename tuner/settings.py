"""The keys of each command: what a configuration holds at its top level and under `train`.

`conf/config.yaml` and `conf/verb/<verb>.yaml` hold the values, these classes the names and types; `tuner.config.check`
reads them from source. No key has a default here: the YAML is the only home of a default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from tuner.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Probability = Annotated[float, "> 0", "<= 1"]


class Member(Protocol):
    """A member of a config group: its `_target_` names the class or function whose signature says the keys."""


@dataclass(frozen=True)
class Train:
    """How long to train and how often to look.

    Args:
        batch_size: examples in one forward and backward pass; `auto` is as many of the examples of a step as are
            predicted to fit, a divisor of their number.
        gradient_accumulation_steps: passes that make one optimizer step; with `auto`, the examples of a step.
        max_steps: optimizer steps; None goes by `epochs`.
        epochs: passes over the training data; None goes by `max_steps`.
        clip_grad_norm: largest norm of the whole gradient; None is unclipped.
        clip_grad_norm_per_parameter: largest norm of the gradient of each parameter by itself; None is unclipped.
        on_nonfinite: a loss or gradient norm that is not finite ends the run before the optimizer step (`stop`), or the
            step is left out (`skip`): weights and optimizer stay as they were, and the run goes on behind it.
        on_oom: memory that runs out ends the run (`stop`), or the step is computed again with half as many rows at once
            in twice as many passes (`retry`), and so are all that follow; evaluations likewise.
        log_every_steps: distance of the lines in metrics.jsonl.
        val_every_steps: distance of the evaluations between the first and the last; None is at epoch ends only.
        early_stopping_patience: evaluations without improvement that end the run; None never ends it early.
        early_stopping_min_delta: what the validation loss has to fall by, and more than that, to be an improvement.
        objective: the number of the summary that a sweep compares.
        compile: compile the model with torch.compile.
        deterministic: the same bits from the same run on a GPU too, at a cost in speed; an operation that cannot give
            them raises.
        num_threads: CPU threads; None becomes this machine's number when the config is frozen, since bits depend on it.
        num_samples: validation examples generated before and after.
        max_new_tokens: longest of these generations.
    """

    batch_size: PositiveInt | Literal["auto"]
    gradient_accumulation_steps: PositiveInt
    max_steps: PositiveInt | None
    epochs: PositiveInt | None
    clip_grad_norm: PositiveFloat | None
    clip_grad_norm_per_parameter: PositiveFloat | None
    on_nonfinite: Literal["stop", "skip"]
    on_oom: Literal["stop", "retry"]
    log_every_steps: PositiveInt
    val_every_steps: PositiveInt | None
    early_stopping_patience: PositiveInt | None
    early_stopping_min_delta: NonNegativeFloat
    objective: Literal["val_loss", "train_loss", "tokens_per_s", "peak_memory_mib", "seconds"]
    compile: bool
    deterministic: bool
    num_threads: PositiveInt | None
    num_samples: NonNegativeInt
    max_new_tokens: PositiveInt


@dataclass(frozen=True)
class Sweep:
    """What a sweep does with points that need no run or cannot have one.

    Args:
        on_illegal: a point that breaks a rule is left out (`skip`), or nothing is run at all (`refuse`).
        rerun: which of the trials that a sweep folder holds already are run again: those that ended badly (`failed`),
            `all`, or `none`; one that was stopped goes on in any case.
    """

    on_illegal: Literal["skip", "refuse"]
    rerun: Literal["none", "failed", "all"]


@dataclass(frozen=True)
class Estimate:
    """Of what device `tuner estimate` predicts the memory.

    Args:
        device: its name in the table of devices; None is the device that the run would have here.
    """

    device: str | None


@dataclass(frozen=True)
class Run:
    """`tuner [run]`: one training run."""

    model: Member
    data: Member
    quantization: Member
    precision: Member
    peft: Member
    memory: Member
    optimizer: Member
    schedule: Member
    distributed: Member
    checkpoint: Member
    logger: Member
    adapter: str | None
    out: str
    seed: NonNegativeInt
    device: Literal["auto", "cpu", "cuda"]
    train: Train
    sweep: Sweep
    estimate: Estimate
    trust_targets: list[str]


@dataclass(frozen=True)
class Generate:
    """`tuner generate`: text from a model, with an adapter or without."""

    model: Member
    quantization: Member
    precision: Member
    run: str | None
    adapter: str | None
    checkpoint: str | None
    prompt: str | None
    prompts: str | None
    batch_size: PositiveInt
    system: str | None
    chat: bool
    max_new_tokens: PositiveInt
    temperature: NonNegativeFloat
    top_p: Probability
    seed: NonNegativeInt
    device: Literal["auto", "cpu", "cuda"]
    trust_targets: list[str]


@dataclass(frozen=True)
class Evaluate:
    """`tuner evaluate`: loss and perplexity on the validation split of a dataset."""

    model: Member
    data: Member
    quantization: Member
    precision: Member
    run: str | None
    adapter: str | None
    checkpoint: str | None
    batch_size: PositiveInt
    device: Literal["auto", "cpu", "cuda"]
    trust_targets: list[str]


@dataclass(frozen=True)
class Merge:
    """`tuner merge`: an adapter into its base, written as a Hugging Face folder."""

    model: Member
    quantization: Member
    precision: Member
    run: str | None
    adapter: str | None
    checkpoint: str | None
    dest: str
    merge_into: Literal["dequantized", "original"]
    device: Literal["auto", "cpu", "cuda"]
    trust_targets: list[str]


@dataclass(frozen=True)
class Export:
    """`tuner export`: an adapter or a model from any checkpoint of a run."""

    model: Member
    quantization: Member
    precision: Member
    run: str | None
    checkpoint: str | None
    dest: str
    merged: bool
    merge_into: Literal["dequantized", "original"]
    device: Literal["auto", "cpu", "cuda"]
    trust_targets: list[str]


@dataclass(frozen=True)
class Convert:
    """`tuner convert`: a GGUF file, Meta's checkpoint or a Hugging Face folder, written as a Hugging Face folder."""

    source: str
    dest: str
    dtype: Literal["auto", "fp32", "bf16", "fp16"]
