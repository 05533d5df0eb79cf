"""What the parts of a run agree on: protocols, small records and the number types of configuration keys.

Components import this module and `tuner.errors`, never each other; `tuner.build` and `tuner.train` put them together.
Importing it costs nothing: torch is named in annotations only.

Shape letters, used in names and docstrings everywhere: B batch, T tokens of a sequence, N trained tokens, D hidden
size, V vocabulary size, H query heads, K key/value heads, E size of a head, R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Protocol, TypedDict, runtime_checkable

from tuner.row_limit import RowLimit

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tuner.loss_scale import LossScale

IGNORE = -100
"""The label of a position whose token is not trained on."""

# Number types of configuration keys. The text is the bound that `tuner.config` enforces and prints.
PositiveInt = Annotated[int, "> 0"]
NonNegativeInt = Annotated[int, ">= 0"]
PositiveFloat = Annotated[float, "> 0"]
NonNegativeFloat = Annotated[float, ">= 0"]
Fraction = Annotated[float, ">= 0", "< 1"]

PackagedTokenizer = Literal["tiny", "llama2", "mistral", "phi3", "gemma", "llama3", "qwen", "smollm2"]
"""The small tokenizers that come with the package."""

DeviceType = Literal["cpu", "cuda"]
"""Whose kernels a model has."""

ChatTemplateName = Literal["alpaca", "chatml", "gemma", "llama2", "llama3", "mistral", "phi3", "plain"]
"""The chat templates that come with the package."""


class Message(TypedDict):
    """One turn of a conversation.

    Keys:
        role: system, user, assistant or tool.
        content: its text, empty where an assistant calls tools and says nothing.
        tool_calls: of an assistant: objects `{"type": "function", "function": {"name": ..., "arguments": {...}}}`.
        name: who speaks; of a tool, which it is.
        tool_call_id: of a tool: the `id` of the call that it answers.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


Tools = Sequence[Mapping[str, Any]]
"""JSON schemas of what an assistant may call."""


class Tokenizer(Protocol):
    """Text to token ids and back, as the model's own tokenizer does it."""

    vocab_size: int
    eos_id: int
    pad_id: int
    chosen_template: str | None
    """The chat template of `use_chat_template`, None for the folder's own."""

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text: `eos_id` and those of the model's generation_config.json."""

    @property
    def reply_end_ids(self) -> frozenset[int]:
        """Those, and the one that the chat template writes behind a reply."""

    def encode(self, text: str, *, control_tokens: bool = False, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`.

        `</s>` and its like are letters unless `control_tokens` says otherwise, and nothing is added unless
        `add_special_tokens` asks for what the model's texts begin and end with.
        """

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`."""

    def render_chat(
        self, messages: Sequence[Message], *, tools: Tools | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as the model's chat template writes it."""

    def apply_chat_template(
        self, messages: Sequence[Message], *, tools: Tools | None = None, add_generation_prompt: bool = False
    ) -> list[int]:
        """Ids of the rendered conversation."""

    def encode_chat(
        self, messages: Sequence[Message], *, tools: Tools | None = None, last_reply_only: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Ids of the rendered conversation and, for each, whether an assistant wrote it (its end token included).

        With `last_reply_only`, whether it wrote it in its last turn. A template that writes the date writes
        `DATE_OF_DATA`, so that the same data has the same ids on every day.
        """

    def use_chat_template(self, chosen: str) -> None:
        """Write conversations with another template than the folder's, which `save` then keeps.

        Args:
            chosen: one of `ChatTemplateName`, or a `.jinja` file.

        Raises:
            ModelError: neither, a file that is no template, or the vocabulary lacks a token that a built-in one writes.
        """

    def add_tokens(self, tokens: Sequence[str], control: Collection[str] = ()) -> list[int]:
        """Make each of `tokens` one token, in every text from here on; their ids, which follow those there are.

        They are ordinary tokens and no control tokens: text that holds one is encoded to it, and it is shown when ids
        are decoded. Those in `control` are written by the chat template alone.

        Raises:
            ModelError: the vocabulary has some of them already, or this kind of tokenizer cannot learn any.
        """

    def digest(self) -> str:
        """Digest of all that decides how a conversation is encoded: equal digests encode everything equally."""

    def save(self, folder: Path) -> None:
        """Write the files a Hugging Face folder holds for its tokenizer, tokens that were added included."""


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
        largest_token: the largest id that occurs.
        num_tokens: of all training samples.
        bad_rows: rows that were left out because they are bad: where each is and why.
        stream: the training samples, where they are read as they are trained on; `train` is empty then, `fingerprint`
            of what they are made from, and `largest_token` is of the validation samples.
    """

    train: Sequence[Sample]
    validation: Sequence[Sample]
    dialogues: Sequence[Dialogue]
    fingerprint: str
    counts: Mapping[str, int]
    name: str
    largest_token: int
    num_tokens: int
    bad_rows: Sequence[str] = ()
    stream: SampleStream | None = None

    @property
    def mean_tokens(self) -> float:
        """Of a training sample; of a validation sample where those to train on are not known before."""
        if self.stream is None:
            return self.num_tokens / len(self.train)
        return sum(len(sample.tokens) for sample in self.validation) / len(self.validation)


@dataclass(frozen=True)
class StreamPosition:
    """What a stream has handed out: `epoch` whole epochs, of the next `index` examples and `piece` samples more."""

    epoch: int = 0
    index: int = 0
    piece: int = 0


@dataclass(frozen=True)
class DrawnSample:
    """One sample and where its stream goes on behind it."""

    sample: Sample
    after: StreamPosition

    @property
    def number(self) -> int:
        """The place of its example in the order of the epoch; the pieces of one example share it."""
        return self.after.index if self.after.piece else self.after.index - 1


class SampleStream(Protocol):
    """Samples that are made as they are asked for, in an order that depends on seed, epoch and `fingerprint` alone."""

    fingerprint: str

    @property
    def counts(self) -> Mapping[str, int]:
        """What was read so far in this process, and what of it was left out."""

    def samples(self, seed: int, position: StreamPosition) -> Generator[DrawnSample, None, None]:
        """What is left of an epoch. Some may be read ahead until it is closed."""


class DataSource(Protocol):
    """A member of the `data` group."""

    def load(self, tokenizer: Tokenizer) -> Dataset:
        """Read and tokenize everything.

        Raises:
            DataError: naming the file and the line.
        """

    def order(self, dataset: Dataset, *, seed: int, window: int) -> EpochOrder:
        """How the training samples are put into the rows of batches, `window` rows a step."""


class EpochOrder(Protocol):
    """The rows that an epoch trains on.

    Attributes:
        packed: whether a row is several samples, each a document that sees no other.
        num_rows: of every epoch.
        fingerprint: of the data.
    """

    packed: bool
    num_rows: int
    fingerprint: str

    def rows(self, epoch: int) -> Sequence[Sequence[int]]:
        """Indices of training samples, each in exactly one row, in the order of training."""

    def described(self) -> Mapping[str, Any]:
        """What a logger says of it."""


@dataclass(frozen=True)
class Batch:
    """Right-padded rows.

    Attributes:
        tokens, labels: int64 [B, T].
        lengths: of each row, its tokens that are not padding; None where there is no padding.
        documents: of packed rows, the lengths of each row's documents, which see nothing of each other; what is behind
            the last is padding. None where each row is one text.
        sample_ids: the samples it is made of, from the first row to the last and within a row from left to right: their
            indices in `Dataset.train`. Of a stream the places of their examples in the order of the epoch, so that
            `stream.samples(seed, StreamPosition(epoch, id))` begins with one. Empty where nobody has numbered them.
    """

    tokens: Tensor
    labels: Tensor
    lengths: Sequence[int] | None = None
    documents: Sequence[Sequence[int]] | None = None
    sample_ids: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.tokens.numel() if self.lengths is None else sum(self.lengths)

    @property
    def num_trained(self) -> int:
        """Labels that count: those a prediction exists for, so not the first position."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def cut(self, most_rows: int) -> list[Batch]:
        """The same rows in batches of so many at most, each without the columns that are padding in all of its rows."""
        if self.num_rows <= most_rows:
            return [self]
        return [self._rows(start, start + most_rows) for start in range(0, self.num_rows, most_rows)]

    def _rows(self, start: int, end: int) -> Batch:
        lengths = None if self.lengths is None else self.lengths[start:end]
        tokens, labels = (x[start:end, : max(lengths or [x.shape[1]])].contiguous() for x in (self.tokens, self.labels))
        documents = None if self.documents is None else self.documents[start:end]
        each = [1] * self.num_rows if self.documents is None else [len(row) for row in self.documents]
        ids = self.sample_ids[sum(each[:start]) : sum(each[:end])]
        return Batch(tokens, labels, lengths, documents, ids)

    def to(self, device: torch.device) -> Batch:
        tokens, labels = (x.to(device, non_blocking=True) for x in (self.tokens, self.labels))
        return replace(self, tokens=tokens, labels=labels)


@runtime_checkable
class FrozenLinear(Protocol):
    """A linear layer whose weight is stored in another form than a dense matrix."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features] in the compute dtype, made anew at each call."""

    def compute_in(self, dtype: torch.dtype) -> None:
        """Make the weight dense in `dtype` from now on."""


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
    new_tokens: tuple[int, ...]
    """Ids of tokens that the pretrained weights do not know: their rows of embedding and head have yet to be learnt."""
    lm_head: nn.Module
    logit_softcap: float | None
    device_type: DeviceType
    """Whose kernels it was given when it was built."""
    fused: Mapping[str, tuple[str, ...]]
    """Ends of the names of matrices in checkpoints -> of the linear layers that are stacked in each."""

    def hidden(self, tokens_BT: Tensor, *, documents: Sequence[Sequence[int]] | None = None) -> Tensor:
        """Normalised last hidden states [B, T, D], of which `lm_head` makes logits; `documents` as in `Batch`.

        Where `logit_softcap` is a number c, logits l become c tanh(l / c)."""

    def linears(self) -> Iterator[LinearSlot]:
        """Every linear layer of the blocks and the head."""


class Quantization(Protocol):
    """A member of the `quantization` group."""

    name: str

    def packed(self, linear: nn.Linear) -> nn.Module:
        """The layer with its weight in frozen packed parameters, on the device where it is."""

    def quantize(self, model: nn.Module) -> None:
        """Replace the linear layers of `model` in place by packed ones."""


class Peft(Protocol):
    """A member of the `peft` group."""

    name: str

    def adapt(self, model: nn.Module) -> None:
        """Freeze and add what is to train, in place; afterwards exactly that has `requires_grad`."""


@runtime_checkable
class ChangesWeights(Protocol):
    """A method that changes frozen weights, which has to happen before they are quantized."""

    def before_packing(self, model: nn.Module, slot: LinearSlot) -> None:
        """Called for each linear layer of the blocks of `model`, in place and plain, when its weights have arrived."""


@dataclass(frozen=True)
class Precision:
    """What a run computes in and what its trainable parameters are kept in.

    Attributes:
        name: of the group's member: `fp32`, `bf16`, `amp_bf16`, ...
        compute: dtype of matrix products and their inputs, as `torch.dtype`'s name: `float32`, `bfloat16`, `float16`.
        trainable: `auto`, `bf16` or `fp32`: the dtype trainable parameters are held in.
        weights: dtype the model's weights are held in; None is `compute`.
        initial_loss_scale: what the loss is multiplied with at first, so that small gradients do not vanish; None
            leaves it as it is.
        growth_interval: steps without overflow after which that factor is doubled.
        stochastic_rounding: whether what the optimizer makes of bf16 parameters is rounded to bf16 at random.
    """

    name: str
    compute: str
    trainable: str = "auto"
    weights: str | None = None
    initial_loss_scale: float | None = None
    growth_interval: int = 0
    stochastic_rounding: bool = False

    @property
    def held(self) -> str:
        """The dtype of the weights as they are loaded."""
        return self.weights or self.compute


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


class StepsInBackward(Protocol):
    """Steps each parameter within the backward pass and frees its gradient."""

    def grad_norm(self) -> Tensor:
        """Norm of the whole gradient of the last backward pass, before clipping."""


class OptimizerPlace(Protocol):
    """Where an optimizer has its parameters when it looks at them, and with them its state."""

    def there(self) -> AbstractContextManager[None]:
        """In the block the parameters are there, for an optimizer to be made over them."""

    def step_there(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer that was made there step and load its state there from now on."""


@dataclass
class State:
    """Everything a run changes as it goes, and so everything that resuming restores.

    Attributes:
        model: its trainable parameters change.
        optimizer: steps them.
        batches: the training windows; its `position` is the place in the data.
        step: optimizer steps done, skipped ones included.
        tokens: tokens the model has read while training, padding excluded.
        seconds: time spent in steps, over all processes.
        train_loss: of the last step that was not skipped.
        skipped_steps: those whose gradient was dropped because it or the loss was not finite.
        loss_scale: what gradients are scaled with, where the precision needs it.
        train_rows, val_rows: how many rows go through the model at once, in training and in evaluations.
        val_loss_before: validation loss before the first step.
        best_val_loss, best_step: the lowest validation loss after the first step and where it was.
        improved_val_loss, improved_step: the last one that was lower than the one before it in this place by more than
            `train.early_stopping_min_delta`; where that is 0 it is the best.
        evaluations_since_improved: how many came after it, or without one.
        before: what the model wrote for the sample prompts before the first step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Positioned
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float | None = None
    skipped_steps: int = 0
    val_loss_before: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    improved_val_loss: float | None = None
    improved_step: int | None = None
    evaluations_since_improved: int = 0
    before: list[str] = field(default_factory=list)
    loss_scale: LossScale | None = None
    train_rows: RowLimit = field(default_factory=RowLimit)
    val_rows: RowLimit = field(default_factory=RowLimit)


class Positioned(Protocol):
    """Windows of batches that can say and be told where they are."""

    @property
    def at_epoch_end(self) -> bool:
        """Whether the window last handed out was an epoch's last."""

    @property
    def epochs_done(self) -> int:
        """How many epochs were handed out to their end."""

    def described(self) -> Mapping[str, Any]:
        """What a logger says of how samples are put together."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go there.

        Raises:
            CheckpointError: it is a place in other data.
        """

    def __next__(self) -> Sequence[Batch]: ...


@dataclass(frozen=True)
class Change:
    """Words that make a run take less memory.

    Attributes:
        words: to be said beside those of the run.
        peak_bytes: of the run with them.
    """

    words: Sequence[str]
    peak_bytes: int


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak memory of a run, predicted: of its training steps, when every row is as long as it may be.

    Attributes:
        device: whose memory.
        batch_size: rows at once; of `train.batch_size=auto` what it came to.
        components: bytes that are alive at the peak: `frozen_weights`, `quantization_scales`, `trainable_weights`,
            `gradients`, `optimizer_state`, `activations`, `logits`, `temporary`; and, not among what has to fit,
            `paged_state`, which the driver moves out of the way.
        when: the part of a step that has the peak.
        available_bytes: what the device has for them.
        largest_batch: the largest `train.batch_size` that fits with the rows as they are; None if none does.
        longest_sequence: the longest `data.max_seq_len` that fits with the batch as it is; None if none does.
        changes: where it does not fit, up to three ways to make it fit, the one that costs least first.
    """

    device: str
    batch_size: int
    components: Mapping[str, int]
    when: str
    available_bytes: int
    largest_batch: int | None
    longest_sequence: int | None
    changes: Sequence[Change] = ()

    @property
    def peak_bytes(self) -> int:
        """Of the components that have to fit, the largest sum at once; as `torch.cuda.max_memory_allocated` says."""
        return sum(size for name, size in self.components.items() if name != "paged_state")

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.available_bytes


@dataclass
class Summary:
    """`summary.json`: how a run ended.

    Attributes:
        status: `finished`, `stopped` (asked to, can be resumed) or `failed`.
        objective: the field that `train.objective` names; what a sweep compares.
        val_loss_before, val_loss: mean cross-entropy a trained token on the validation split, in nats.
        best_val_loss, best_step: as in `State`; what the run leaves is of its last step all the same.
        train_loss: of the last step that was not skipped.
        steps: optimizer steps done, skipped ones included.
        skipped_steps: those whose loss or gradient was not finite (`train.on_nonfinite=skip`), or whose scaled gradient
            overflowed (`precision=amp_fp16`).
        total_steps: that the run is to have at its end; None where it ended before that was known.
        batch_size_used, accumulation_used: rows at once and passes a step, as of the last step: those of the
            configuration, or fewer and more since memory ran out (`train.on_oom=retry`).
        tokens: tokens read while training, prompts included, padding excluded.
        tokens_per_s: of this process, padding excluded, evaluations excluded.
        peak_memory_mib: CUDA: largest allocated memory; CPU: peak resident set of the process.
        peak_tensor_mib: largest memory that PyTorch's allocator had given out: on CUDA the same; None on a CPU, where
            only a profiler knows it.
        predicted_memory_mib: what that was predicted to be, by `tuner.estimate`, for the longest rows that the data may
            have; None on a CPU, or where it could not be predicted.
        total_params: parameters of the model, packed ones as what they stand for, adapters not counted.
        trainable_params: those that train.
        seconds: from the start of the process's run to its end.
        seconds_to_first_step: of it, what passed before training began.
        precision, trainable_dtype, device: what really ran.
        mlflow_run_id: None without MLflow.
        out: the run folder.
        reason: why it stopped, failed, or finished before its last step; where memory ran out it begins with
            `out of memory: `.
        resume: the command that goes on with it; None for a finished run.
        log_tail: of a run that failed, the last lines of `run.log`, with the traceback in them.
    """

    status: str
    out: str
    objective: float | None = None
    val_loss_before: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    train_loss: float | None = None
    steps: int = 0
    skipped_steps: int = 0
    total_steps: int | None = None
    batch_size_used: int | None = None
    accumulation_used: int | None = None
    tokens: int = 0
    tokens_per_s: float | None = None
    peak_memory_mib: float | None = None
    peak_tensor_mib: float | None = None
    predicted_memory_mib: float | None = None
    trainable_params: int = 0
    total_params: int = 0
    seconds: float = 0.0
    seconds_to_first_step: float | None = None
    precision: str | None = None
    trainable_dtype: str | None = None
    device: str | None = None
    mlflow_run_id: str | None = None
    reason: str | None = None
    resume: str | None = None
    log_tail: list[str] = field(default_factory=list)
