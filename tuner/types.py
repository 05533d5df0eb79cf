"""What the parts of a run agree on: protocols, small records and the number types of configuration keys.

Components import this module and `tuner.errors`, never each other; `tuner.build` and `tuner.train` put them together.
Importing it costs nothing: torch is named in annotations only.

Shape letters, used in names and docstrings everywhere: B batch, T tokens of a sequence, N trained tokens, D hidden
size, V vocabulary size, H query heads, K key/value heads, E size of a head, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

IGNORE = -100
"""The label of a position whose token is not trained on."""

# Number types of configuration keys. The text is the bound that `tuner.config` enforces and prints.
PositiveInt = Annotated[int, "> 0"]
NonNegativeInt = Annotated[int, ">= 0"]
PositiveFloat = Annotated[float, "> 0"]
NonNegativeFloat = Annotated[float, ">= 0"]
Fraction = Annotated[float, ">= 0", "< 1"]


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str


class Tokenizer(Protocol):
    """Text to token ids and back, as the model's own tokenizer does it."""

    vocab_size: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`."""

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as the model's chat template writes it."""

    def apply_chat_template(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> list[int]:
        """Ids of the rendered conversation."""

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids of the rendered conversation and, for each, whether an assistant wrote it (its end token included)."""

    def save(self, folder: Path) -> None:
        """Write the files a Hugging Face folder holds for its tokenizer."""


@dataclass(frozen=True)
class Sample:
    """One training example: `labels[i]` is `tokens[i]` where that token is trained on and `IGNORE` elsewhere."""

    tokens: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True)
class Dialogue:
    """A validation example as text, for the generations a person compares: what is asked and the true reply."""

    messages: Sequence[Message]
    reply: str


@dataclass(frozen=True)
class Dataset:
    """Tokenized training and validation examples and what was found on the way.

    Attributes:
        train: examples to train on, in the source's order (the loop shuffles by seed and epoch).
        validation: examples that are never trained on.
        dialogues: a few validation examples as text.
        fingerprint: hex digest of everything the examples are made of; equal in every process.
        counts: `truncated`, `dropped`, `duplicates`, ... as far as they apply.
        name: what it is called in logs.
    """

    train: Sequence[Sample]
    validation: Sequence[Sample]
    dialogues: Sequence[Dialogue]
    fingerprint: str
    counts: Mapping[str, int]
    name: str


class DataSource(Protocol):
    """A member of the `data` group."""

    def load(self, tokenizer: Tokenizer) -> Dataset:
        """Read and tokenize everything.

        Raises:
            DataError: naming the file and the line.
        """


@dataclass(frozen=True)
class Batch:
    """Right-padded examples.

    Attributes:
        tokens, labels: int64 [B, T].
        num_tokens: tokens that are not padding.
    """

    tokens: Tensor
    labels: Tensor
    num_tokens: int

    @property
    def num_trained(self) -> int:
        """Labels that count: those a prediction exists for, so not the first position."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.tokens.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), self.num_tokens
        )


@runtime_checkable
class FrozenLinear(Protocol):
    """A linear layer whose weight is stored in another form than a dense matrix."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features] in the compute dtype, made anew at each call."""


@dataclass(frozen=True)
class LinearSlot:
    """The place of one linear layer in a model, which quantization and PEFT methods replace.

    Attributes:
        role: the word of configuration keys: `q_proj`, `k_proj`, `v_proj`, `output_proj`, `mlp` or `output`.
        parent: the module that holds it.
        name: its attribute there.
        path: its full name in the checkpoint.
    """

    role: str
    parent: nn.Module
    name: str
    path: str

    @property
    def module(self) -> nn.Module:
        return getattr(self.parent, self.name)  # type: ignore[no-any-return]

    def replace(self, module: nn.Module) -> None:
        setattr(self.parent, self.name, module)


class CausalLM(Protocol):
    """What a model family offers to the parts that work on it; every family is also an `nn.Module`."""

    tied: bool
    vocab_size: int
    max_position_embeddings: int
    lm_head: nn.Module

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Normalised last hidden states [B, T, D], of which `lm_head` makes logits."""

    def linears(self) -> Iterator[LinearSlot]:
        """Every linear layer of the blocks and the head."""


class Quantization(Protocol):
    """A member of the `quantization` group."""

    name: str

    def quantize(self, model: nn.Module) -> None:
        """Replace the linear layers of `model` in place; their weights become frozen packed parameters."""


class Peft(Protocol):
    """A member of the `peft` group."""

    name: str

    def adapt(self, model: nn.Module) -> None:
        """Freeze and add what is to train, in place; afterwards exactly that has `requires_grad`."""


@dataclass(frozen=True)
class Precision:
    """What a run computes in and what its trainable parameters are kept in.

    Attributes:
        name: `fp32`, `bf16`.
        compute: dtype of weights and activations, as `torch.dtype`'s name: `float32`, `bfloat16`.
        trainable: `auto`, `bf16` or `fp32`: the dtype trainable parameters are held in.
    """

    name: str
    compute: str
    trainable: str = "auto"


@dataclass(frozen=True)
class RunInfo:
    """What a logger is told once, at the start.

    Attributes:
        out: the run folder (absolute).
        config: the resolved configuration as nested plain containers.
        overrides: the command-line words it was composed from.
        dataset: name, fingerprint and counts of the data.
        resumed: whether this process continues an earlier one in the same folder.
    """

    out: Path
    config: Mapping[str, Any]
    overrides: Sequence[str]
    dataset: Mapping[str, Any]
    resumed: bool = False


class Logger(Protocol):
    """A member of the `logger` group: start, then log and artifact, then close, in this order.

    No method raises because a backend is slow or away: training goes on, and the reason is said once through
    `warnings.warn`. Calls return at once; slow work is done behind the training steps.
    """

    def start(self, run: RunInfo) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def artifact(self, path: Path) -> None:
        """Keep a file or folder of the run folder with the run."""

    def close(self, status: str, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Flush and end with `finished`, `stopped` or `failed`; returns facts for the summary, as `mlflow_run_id`."""


@dataclass
class State:
    """Everything a run changes as it goes, and so everything that resuming restores.

    Attributes:
        model: its trainable parameters change.
        optimizer: steps them.
        batches: the training windows; its `position` is the place in the data.
        step: optimizer steps done.
        tokens: tokens the model has read while training, padding excluded.
        seconds: time spent in steps, over all processes.
        train_loss: of the last step.
        val_loss_before: validation loss before the first step.
        before: what the model wrote for the sample prompts before the first step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Positioned
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float | None = None
    val_loss_before: float | None = None
    before: list[str] = field(default_factory=list)


class Positioned(Protocol):
    """Windows of batches that can say and be told where they are."""

    @property
    def at_epoch_end(self) -> bool:
        """Whether the window last handed out was an epoch's last."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go there.

        Raises:
            CheckpointError: it is a place in other data.
        """

    def __next__(self) -> Sequence[Batch]: ...


@dataclass
class Summary:
    """`summary.json`: how a run ended.

    Attributes:
        status: `finished`, `stopped` (asked to, can be resumed) or `failed`.
        objective: the field that `train.objective` names; what a sweep compares.
        val_loss_before, val_loss: mean cross-entropy a trained token on the validation split, in nats.
        train_loss: of the last step.
        steps: optimizer steps done.
        tokens: tokens read while training, prompts included, padding excluded.
        tokens_per_s: of this process, padding excluded, evaluations excluded.
        peak_memory_mib: CUDA: largest allocated memory; CPU: peak resident set of the process.
        total_params: parameters of the model, packed ones as what they stand for, adapters not counted.
        trainable_params: those that train.
        seconds: from the start of the process's run to its end.
        seconds_to_first_step: of it, what passed before training began.
        precision, trainable_dtype, device: what really ran.
        mlflow_run_id: None without MLflow.
        out: the run folder.
        reason: why it stopped or failed.
    """

    status: str
    out: str
    objective: float | None = None
    val_loss_before: float | None = None
    val_loss: float | None = None
    train_loss: float | None = None
    steps: int = 0
    tokens: int = 0
    tokens_per_s: float | None = None
    peak_memory_mib: float | None = None
    trainable_params: int = 0
    total_params: int = 0
    seconds: float = 0.0
    seconds_to_first_step: float | None = None
    precision: str | None = None
    trainable_dtype: str | None = None
    device: str | None = None
    mlflow_run_id: str | None = None
    reason: str | None = None
