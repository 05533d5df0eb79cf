"""The optimizer's step within backward: the ordinary loop bit for bit, with one gradient at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tuner.build import build_model, load_base
from tuner.checkpoint.default import Checkpoints
from tuner.checkpoint.snapshot import trainable
from tuner.checkpoint.store import CheckpointStore
from tuner.data.batches import Batches
from tuner.data.order import Shuffled
from tuner.errors import TrainingError
from tuner.loop import Step, training_steps
from tuner.memory.default import MemoryTechniques
from tuner.models.decoder import Decoder
from tuner.models.llama import LlamaConfig
from tuner.optimizers.adamw import adamw
from tuner.optimizers.adamw8bit import adamw8bit
from tuner.optimizers.custom import custom
from tuner.optimizers.groups import Trained, trained
from tuner.optimizers.sgd import sgd
from tuner.peft.full import Full
from tuner.peft.lora import LoRA
from tuner.quantization.nf4 import NF4
from tuner.quantization.none import NoQuantization
from tuner.types import Precision, Sample, State, StepsInBackward

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GROUPS: dict[str, Any] = {"loraplus_lr_ratio": None, "no_decay": []}
ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.01, **GROUPS}
OPTIMIZERS: dict[str, Callable[[Sequence[Trained]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: adamw(parameters, **ADAMW, fused=True),
    "sgd": lambda parameters: sgd(parameters, 0.1, 0.9, True, 0.01, **GROUPS),
    "adamw8bit": lambda parameters: adamw8bit(parameters, **ADAMW, min_8bit_size=256),
    "RAdam": lambda parameters: custom("torch.optim.RAdam", parameters, {"lr": 1e-2}, []),
    "Lion8bit": lambda parameters: custom("bitsandbytes.optim.Lion8bit", parameters, {"lr": 1e-3}, []),
}
STEPS = 5


class Falling:
    def factor(self, step: int, total_steps: int) -> float:
        return 1.0 - step / total_steps


class Run:
    """A state and what steps it."""

    def __init__(
        self,
        in_backward: bool,
        method: str = "lora",
        optimizer: str = "adamw",
        *,
        clip_each: float | None = None,
        checkpointing: Any = "none",
        tied: bool = True,
    ) -> None:
        self.clip_each = clip_each
        torch.manual_seed(7)
        quantization = NF4(64, double_quant=True) if method == "qlora" else NoQuantization()
        config = LlamaConfig.from_hugging_face({**SHAPE, "tie_word_embeddings": tied}, None)
        base = load_base(config, torch.float32, torch.device("cpu"), 1, quantization)
        lora = LoRA("lora", 8, 8, 0.0, ["q_proj", "v_proj"], True, False, False)
        memory = MemoryTechniques(checkpointing, False, in_backward, False)
        peft = Full("full") if method == "full" else lora
        self.model: Decoder = build_model(base, peft, Precision("fp32", "float32"), memory)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in self.model.named_parameters():
            if name.endswith(".B"):  # or the first gradients of A were zero
                nn.init.normal_(parameter, std=0.1, generator=generator)
        rows = [torch.randint(0, 61, (length,), generator=generator).tolist() for length in range(4, 12)]
        order = Shuffled([len(row) for row in rows], seed=5, fingerprint="x")
        batches = Batches([Sample(row, row) for row in rows], order, batch_size=2, accumulation=1, pad_id=0)
        self.state = State(self.model, OPTIMIZERS[optimizer](trained(self.model)), batches)
        self.in_backward: StepsInBackward | None = memory.steps_in_backward(self.state.optimizer, clip_each)

    def train(self, until: int) -> list[Step]:
        words: Any = {"clip_grad_norm_per_parameter": self.clip_each, "in_backward": self.in_backward}
        cpu = torch.device("cpu")
        steps = training_steps(self.state, Falling(), total_steps=STEPS, clip_grad_norm=None, device=cpu, **words)
        return list(islice(steps, until - self.state.step))


def numbers(steps: list[Step]) -> list[tuple[float, ...]]:
    return [(step.number, step.loss, step.grad_norm, step.lr, step.tokens) for step in steps]


def assert_equal(found: Run, expected: Run) -> None:
    """Weights and optimizer state, bit for bit: the same operations on the same gradients."""
    weights = trainable(expected.model)
    assert trainable(found.model).keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(trainable(found.model)[name], value), name
    ours, theirs = found.state.optimizer.state_dict(), expected.state.optimizer.state_dict()
    assert ours["state"].keys() == theirs["state"].keys() == set(range(len(weights)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "optimizer", "words"),
    [
        *(("lora", optimizer, {}) for optimizer in OPTIMIZERS),
        *(("full", optimizer, {}) for optimizer in OPTIMIZERS),
        ("full", "adamw", {"tied": False}),
        ("full", "adamw", {"checkpointing": "full"}),
        ("full", "adamw", {"checkpointing": "selective"}),
        ("qlora", "adamw8bit", {}),
        ("lora", "adamw", {"clip_each": 0.01}),
        ("full", "adamw8bit", {"clip_each": 0.01}),
    ],
)
def test_equals_the_ordinary_loop(method: str, optimizer: str, words: dict[str, Any]) -> None:
    ordinary, in_backward = Run(False, method, optimizer, **words), Run(True, method, optimizer, **words)
    start = {name: value.clone() for name, value in trainable(ordinary.model).items()}
    expected = numbers(ordinary.train(STEPS))
    assert numbers(in_backward.train(STEPS)) == expected
    assert_equal(in_backward, ordinary)
    assert all(not torch.equal(value, start[name]) for name, value in trainable(in_backward.model).items())
    assert all(p.grad is None for p in in_backward.model.parameters())


def test_each_parameter_is_clipped_by_itself() -> None:
    """With SGD of rate 1 and no momentum, the first step is the clipped gradient."""
    clipped, free = Run(False, "full", clip_each=0.05), Run(False, "full")
    for run in (clipped, free):
        run.state.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    before = {name: value.clone() for name, value in trainable(free.model).items()}
    norms = [run.train(1)[0].grad_norm for run in (clipped, free)]
    assert norms[0] == norms[1]  # what is logged is before clipping
    factors = set()
    for name, value in before.items():
        gradient, found = value - trainable(free.model)[name], value - trainable(clipped.model)[name]
        factor = min(1.0, 0.05 / (float(gradient.norm()) + 1e-6))
        factors.add(round(factor, 3))
        assert torch.allclose(found, gradient * factor, atol=1e-6), name  # of weights of about 0.02 in fp32, twice
    assert len(factors) > 3
    assert 1.0 in factors


def test_one_gradient_is_there_at_a_time() -> None:
    run = Run(True, "full", tied=False)
    sizes: list[int] = []

    def look(_: Any) -> None:
        sizes.append(sum(p.grad.numel() for p in run.model.parameters() if p.grad is not None))

    for node in run.model.parameters():
        node.register_post_accumulate_grad_hook(look)  # behind the one that steps
    run.train(2)
    assert sizes == [0] * 2 * len(list(run.model.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("order", [(True, True), (True, False), (False, True)], ids=str)
def test_checkpoints_are_the_ordinary_ones(optimizer: str, order: tuple[bool, bool], tmp_path: Path) -> None:
    """Stopped and continued, each part in either way, is never stopped."""
    whole = Run(False, "full", optimizer)
    expected = numbers(whole.train(STEPS))
    keys = Checkpoints("auto", None, None, False, 1, 0, False, "stop", True, False)
    first, second = Run(order[0], "full", optimizer), Run(order[1], "full", optimizer)
    before = numbers(first.train(2))
    CheckpointStore(tmp_path, keys).save(first.state, None)
    assert CheckpointStore(tmp_path, keys).restore(second.state, STEPS)
    assert before + numbers(second.train(STEPS)) == expected
    assert_equal(second, whole)


def test_a_loss_that_is_not_finite_steps_nothing() -> None:
    run = Run(True, "full")
    with torch.no_grad():
        run.model.model.norm.weight.fill_(torch.inf)
    before = {name: value.clone() for name, value in trainable(run.model).items()}
    with pytest.raises(TrainingError, match=r"step 1: loss nan, gradient norm nan: not finite, not stepped"):
        run.train(1)
    assert all(torch.equal(value, before[name]) for name, value in trainable(run.model).items())


def test_a_gradient_that_is_not_finite_ends_the_run_behind_the_step() -> None:
    run = Run(True, "full")
    run.model.layers[1].mlp.register_full_backward_hook(  # type: ignore[union-attr]
        lambda module, into, out: tuple(None if g is None else g * torch.inf for g in into)
    )
    with pytest.raises(TrainingError, match=r"step 1: loss 4\.\d+, gradient norm nan: not finite, stepped in backward"):
        run.train(1)
    assert run.state.step == 0  # so nothing is saved after it
