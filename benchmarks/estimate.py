"""How far is the predicted peak memory of a training step from the measured one?

Each cell is a small model of a family trained for two real steps by a method, in a precision, with an optimizer, on
batches of the worst case: every row full and every position trained. Measured is the second step. On a CPU that is by
PyTorch's profiler, whose events are the allocator's own: the largest sum of what was handed out and not given back
during the step, above the parameters and the optimizer's state that were there before. On a GPU it is
`torch.cuda.max_memory_allocated`. Predicted is what `python -m tuner estimate` predicts, on fake tensors and, for four
layers, from traces of one and two.

    python benchmarks/estimate.py                  # all cells
    python benchmarks/estimate.py --device cuda    # on a GPU that is there
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout this file is of, installed or not

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tuner.estimating.shapes import Plan
    from tuner.loop import Step
    from tuner.types import Batch, State

MIB = 2**20
SHAPE = ("+scale=tiny", "model.vocab_size=4096", "logger=none")
"""Hidden size 256, 4 layers; a vocabulary so large that the head counts."""

FAMILIES = ("llama", "gemma2", "qwen2", "phi3")
METHODS = ("full", "lora", "qlora")
PRECISIONS = ("fp32", "bf16")
CHECKPOINTING = ("none", "full")
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
BATCHES = (
    ("train.batch_size=4", "data.max_seq_len=256"),
    ("train.batch_size=2", "data.max_seq_len=640"),
    ("train.batch_size=2", "data.max_seq_len=256", "data.packing=pack", "data.pack_len=768"),
    ("train.batch_size=8", "data.max_seq_len=128"),
    ("train.batch_size=3", "data.max_seq_len=320", "train.gradient_accumulation_steps=2"),
)
LARGER = (
    ("model=smollm2_135m", "peft=qlora", "precision=bf16", "optimizer=adamw", "memory.activation_checkpointing=none"),
    (
        "model=smollm2_135m",
        "peft=full",
        "precision=bf16",
        "optimizer=adamw8bit",
        "memory.activation_checkpointing=full",
    ),
)
"""Of 30 layers, which follow from one and two; random weights of that shape."""

TECHNIQUES = (
    ("precision=amp_bf16", "peft=full"),
    ("precision=amp_bf16", "peft=lora"),
    ("precision=amp_bf16", "peft=qlora", "memory=low"),
    ("precision=amp_fp16", "peft=full", "precision.initial_loss_scale=1"),
    ("precision=bf16_stochastic", "peft=full"),
    ("precision=bf16_stochastic", "peft=full", "optimizer=adamw8bit"),
    ("precision=bf16_stochastic", "peft=lora", "precision.trainable=bf16"),
    ("peft=full", "memory.optimizer_in_bwd=true", "train.clip_grad_norm=null"),
    ("peft=full", "memory=low", "memory.optimizer_in_bwd=true", "train.clip_grad_norm=null", "precision=bf16"),
    ("peft=lora", "memory.activation_checkpointing=selective"),
    ("peft=full", "memory.activation_checkpointing=selective", "precision=bf16"),
    ("peft=dora", "precision=bf16"),
    ("peft=dora", "quantization=fp4"),
    ("peft=pissa", "quantization=nf4"),
    ("peft=ia3", "quantization=int8", "precision=bf16"),
    ("peft=layernorm",),
    ("peft=last_layers", "peft.num_layers=2"),
    ("peft=full", "optimizer=adafactor"),
    ("peft=full", "optimizer=muon"),
    ("peft=full", "optimizer=lion8bit"),
    ("peft=full", "optimizer=ademamix8bit"),
    ("peft=lora", "optimizer.no_decay=[norms,biases]", "optimizer.loraplus_lr_ratio=16"),
)
"""Beside the words of `cells`, on a Llama."""


@dataclass(frozen=True)
class Cell:
    """A line of the table; `words` are those of the command line."""

    words: tuple[str, ...]

    @property
    def title(self) -> str:
        return " ".join(word.partition("=")[2] for word in self.words if word not in SHAPE)


@dataclass(frozen=True)
class Outcome:
    """Bytes: predicted and measured peaks, and what of both was there before the step, measured."""

    cell: Cell
    predicted: int
    measured: int
    before: int

    @property
    def error(self) -> float:
        """Of the whole peak."""
        return self.predicted / self.measured - 1

    @property
    def error_of_step(self) -> float:
        """Of what the step itself takes, above weights and optimizer state."""
        return (self.predicted - self.before) / (self.measured - self.before) - 1


def cells() -> list[Cell]:
    """Every family with every method, precision and checkpointing; optimizers and batches in turn."""
    found = [Cell((*words, "train.batch_size=2", "data.max_seq_len=384", "logger=none")) for words in LARGER]
    for index, (family, method, precision, kept) in enumerate(product(FAMILIES, METHODS, PRECISIONS, CHECKPOINTING)):
        optimizer = OPTIMIZERS[(index + index // 3) % len(OPTIMIZERS)]
        choices = (f"model={family}", f"peft={method}", f"precision={precision}", f"optimizer={optimizer}")
        batch = BATCHES[index % len(BATCHES)]
        found.append(Cell((*choices, f"memory.activation_checkpointing={kept}", *batch, *SHAPE)))
    return found + [Cell(("model=llama", *words, *BATCHES[0], *SHAPE)) for words in TECHNIQUES]


def outcome(cell: Cell, device_type: str) -> Outcome:
    """Predict and measure one cell."""
    import torch

    import tuner
    from tuner.estimating.devices import device_named, of_machine
    from tuner.estimating.predicting import Predictor
    from tuner.verbs.estimate import plan_of

    cfg = tuner.freeze(tuner.compose(list(cell.words)))
    tuner.check(cfg)
    device = torch.device(device_type)
    known = of_machine(device) if device_type == "cuda" else device_named("cpu")
    plan = plan_of(cfg, known)
    before, measured = measure(plan, device)
    return Outcome(cell, Predictor(plan, known).peak().total, measured, before)


def run_of(plan: Plan, device: torch.device, total_steps: int) -> tuple[State, Iterator[Step]]:
    """A real run of a plan, on random tokens: its state, and its steps, one each time it is asked."""
    import torch

    from tuner.build import build_model, load_base
    from tuner.loop import training_steps
    from tuner.precision.stochastic_rounding import round_updates
    from tuner.train import loss_scale_of
    from tuner.types import State

    precision = plan.precision
    held = getattr(torch, precision.held)
    base = load_base(plan.model, held, device, 0, plan.quantization, plan.new_tokens, plan.peft)
    model = build_model(base, plan.peft, precision, plan.memory)
    optimizer = plan.make_optimizer(model)
    state = State(model, optimizer, FullBatches(plan), loss_scale=loss_scale_of(precision))
    if precision.stochastic_rounding:
        round_updates(state, 0, model.device_type)
    steps = training_steps(
        state,
        Constant(),
        total_steps=total_steps,
        clip_grad_norm=plan.clip_grad_norm,
        device=device,
        in_backward=plan.memory.steps_in_backward(optimizer, None),
    )
    return state, steps


def measure(plan: Plan, device: torch.device) -> tuple[int, int]:
    """Bytes before the second step and at its peak, both counted by what PyTorch really allocated."""
    state, steps = run_of(plan, device, 2)
    next(steps)
    return peak_of_step(state, steps, device)


def peak_of_step(state: State, steps: Iterator[Step], device: torch.device) -> tuple[int, int]:
    """Bytes before the next step, which is not the first, and at its peak."""
    import torch

    before = stored_bytes(state.model, state.optimizer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        next(steps)
        return before, torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        next(steps)
    return before, before + largest_sum(profiler)


def largest_sum(profiler: Any) -> int:
    """The largest running sum of the allocator's events, in bytes."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):  # type: ignore[no-any-return]
        total += event.nbytes()
        largest = max(largest, total)
    return largest


def stored_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of parameters, buffers and optimizer state, each storage once."""
    import torch

    state = [value for of_parameter in optimizer.state.values() for value in of_parameter.values()]
    tensors = [*model.parameters(), *model.buffers(), *(value for value in state if isinstance(value, torch.Tensor))]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class FullBatches:
    """Real batches of the plan's sizes whose every position is trained."""

    at_epoch_end = False
    epochs_done = 0

    def __init__(self, plan: Plan) -> None:
        from tuner.estimating.shapes import FakeBatches

        self._sizes = FakeBatches.of(plan)
        self._vocabulary = plan.model.vocab_size

    def __next__(self) -> Sequence[Batch]:
        import torch

        from tuner.types import Batch

        drawn = []
        for size in next(self._sizes):
            tokens = torch.randint(self._vocabulary, size.tokens.shape)
            drawn.append(Batch(tokens, tokens.clone(), size.lengths, size.documents))
        return drawn

    def described(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


class Constant:
    """A schedule that changes nothing."""

    def factor(self, step: int, total_steps: int) -> float:
        return 1.0


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Markdown, the worst first."""
    yield "| cell | predicted MiB | measured MiB | error | weights and state MiB | error of the rest |"
    yield "|---|---:|---:|---:|---:|---:|"
    for one in sorted(outcomes, key=lambda one: -abs(one.error)):
        sizes = f"{one.predicted / MIB:.2f} | {one.measured / MIB:.2f} | {one.error:+.2%} | {one.before / MIB:.2f}"
        yield f"| {one.cell.title} | {sizes} | {one.error_of_step:+.2%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="a word that the cells have")
    args = parser.parse_args()
    chosen = [cell for cell in cells() if not args.only or args.only in cell.words]
    outcomes = []
    for cell in chosen:
        outcomes.append(outcome(cell, args.device))
        print(f"{outcomes[-1].error:+.2%} {cell.title}", file=sys.stderr, flush=True)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "bitsandbytes"))
    print(f"- Hardware: {os.cpu_count()} cores, {platform.system()}, device {args.device}")
    print(f"- Versions: Python {platform.python_version()}, {libraries}")
    print(f"- Command: `{shlex.join(['python', 'benchmarks/estimate.py', *sys.argv[1:]])}`")
    print(f"- Cells: {len(outcomes)}; beside the words of a cell, `{' '.join(SHAPE)}` (not for smollm2_135m)\n")
    print("\n".join(table(outcomes)))


if __name__ == "__main__":
    main()
