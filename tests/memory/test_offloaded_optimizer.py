"""An optimizer on the host: the ordinary loop bit for bit, with copies that take their time in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import tuner
from tests.checkpoint.bitwise import assert_bitwise
from tuner.build import build_model, build_optimizer, load_base
from tuner.checkpoint.default import Checkpoints
from tuner.checkpoint.snapshot import trainable
from tuner.checkpoint.store import CheckpointStore
from tuner.config import compose, conf_dir
from tuner.data.batches import Batches
from tuner.data.order import Shuffled
from tuner.errors import ConfigError
from tuner.loop import Step, training_steps
from tuner.memory import offloaded_optimizer
from tuner.memory.default import MemoryTechniques
from tuner.memory.offloaded_optimizer import AHEAD, Here, OnHost
from tuner.models.decoder import Decoder
from tuner.models.llama import LlamaConfig
from tuner.optimizers.groups import trained
from tuner.peft.full import Full
from tuner.peft.lora import LoRA
from tuner.precision.amp_fp16 import amp_fp16
from tuner.precision.bf16_stochastic import bf16_stochastic
from tuner.precision.stochastic_rounding import round_updates
from tuner.quantization.nf4 import NF4
from tuner.quantization.none import NoQuantization
from tuner.train import loss_scale_of
from tuner.types import Precision, Sample, State

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PRECISIONS = {
    "fp32": Precision("fp32", "float32"),
    "bf16": Precision("bf16", "bfloat16"),
    "bf16_stochastic": bf16_stochastic("bf16"),
    "amp_fp16": amp_fp16("auto", initial_loss_scale=2.0**19, growth_interval=2),  # overflows, falls and rises again
}
MEMBERS = sorted(path.stem for path in (conf_dir() / "optimizer").glob("*.yaml"))
OPTIMIZERS = [name for name in MEMBERS if name != "custom" and not name.startswith("paged_")]
STEPS = 5
SMALL = 2**13
"""Bytes of a portion: the models here have about ten."""


class SlowLink:
    """A device whose memory is that of the CPU: what is not yet copied is NaN, and is copied at the last moment.

    Attributes:
        most: copies to the host that were begun and not ended at one time.
    """

    def __init__(self) -> None:
        self.most = 0
        self._leaving: list[tuple[Tensor, Tensor]] = []
        self._returning: list[tuple[Tensor, Tensor]] = []

    def like(self, device_tensor: Tensor) -> Tensor:
        return torch.full_like(device_tensor, torch.nan)

    def begin_out(self, device_tensor: Tensor, host_tensor: Tensor) -> tuple[Tensor, Tensor]:
        assert device_tensor.data_ptr() != host_tensor.data_ptr()
        host_tensor.fill_(torch.nan)
        self._leaving.append((device_tensor, host_tensor))
        self.most = max(self.most, len(self._leaving))
        return device_tensor, host_tensor

    def end_out(self, begun: tuple[Tensor, Tensor]) -> None:
        self._leaving.remove(next(pair for pair in self._leaving if pair[1] is begun[1]))
        begun[1].copy_(begun[0])

    def begin_back(self, host_tensor: Tensor, device_tensor: Tensor) -> None:
        assert device_tensor.data_ptr() != host_tensor.data_ptr()
        device_tensor.fill_(torch.nan)
        self._returning.append((host_tensor, device_tensor))

    def end_back(self) -> None:
        assert not self._leaving
        for host_tensor, device_tensor in self._returning:
            device_tensor.copy_(host_tensor)
        self._returning.clear()


class Falling:
    def factor(self, step: int, total_steps: int) -> float:
        return 1.0 - step / total_steps


@cache
def composed(*words: str) -> DictConfig:
    """The optimizer's node."""
    return cast(DictConfig, compose([*words, "optimizer.lr=0.01"]).optimizer)


class Run:
    """A state and what steps it."""

    def __init__(
        self,
        offloaded: bool,
        method: str = "full",
        optimizer: Sequence[str] = ("optimizer=adamw",),
        *,
        precision: str = "fp32",
        accumulation: int = 1,
        in_backward: bool = False,
        clip: float | None = None,
        clip_each: float | None = None,
        checkpointing: Any = "none",
        portion_bytes: int = SMALL,
    ) -> None:
        torch.manual_seed(7)
        held, quantization = PRECISIONS[precision], NF4(64, True) if method == "qlora" else NoQuantization()
        config = LlamaConfig.from_hugging_face({**SHAPE, "tie_word_embeddings": True}, None)
        base = load_base(config, getattr(torch, held.held), torch.device("cpu"), 1, quantization)
        lora = LoRA("lora", 8, 8, 0.0, ["q_proj", "v_proj"], True, False, False)
        memory = MemoryTechniques(checkpointing, False, in_backward, False)
        self.model: Decoder = build_model(base, Full("full") if method == "full" else lora, held, memory)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in self.model.named_parameters():
            if name.endswith(".B"):  # or the first gradients of A were zero
                nn.init.normal_(parameter, std=0.1, generator=generator)
        rows = [torch.randint(0, 61, (length,), generator=generator).tolist() for length in range(4, 12)]
        order = Shuffled([len(row) for row in rows], seed=5, fingerprint="x")
        samples = [Sample(row, row) for row in rows]
        batches = Batches(samples, order, batch_size=2, accumulation=accumulation, pad_id=0)
        trains, self.link = trained(self.model), SlowLink()
        place = OnHost([one.param for one in trains], self.link, portion_bytes) if offloaded else Here()
        with place.there():
            made = build_optimizer(composed(*optimizer), trains, ["tests"])
        self.in_backward = memory.steps_in_backward(made, clip_each)
        self.state = State(self.model, made, batches, loss_scale=loss_scale_of(held))
        if held.stochastic_rounding:
            round_updates(self.state, 3)
        place.step_there(made)
        self.words: Any = {"clip_grad_norm": clip, "clip_grad_norm_per_parameter": clip_each}

    def train(self, until: int) -> list[Step]:
        words = {**self.words, "device": torch.device("cpu"), "in_backward": self.in_backward}
        steps = training_steps(self.state, Falling(), total_steps=STEPS, **words)
        return list(islice(steps, until - self.state.step))


def numbers(steps: list[Step]) -> list[str]:
    """NaN of a step that overflowed included."""
    return [repr((step.number, step.loss, step.grad_norm, step.lr, step.tokens, step.skipped)) for step in steps]


def assert_equal(found: Run, expected: Run) -> None:
    """Weights and optimizer state, bit for bit: the same operations on the same gradients."""
    assert_bitwise(trainable(found.model), trainable(expected.model))
    assert_bitwise(found.state.optimizer.state_dict(), expected.state.optimizer.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "optimizer", "words"),
    [
        *(("full", [f"optimizer={name}"], {}) for name in OPTIMIZERS),
        ("full", ["optimizer=adamw"], {"portion_bytes": 2**30}),
        ("full", ["optimizer=adamw8bit", "optimizer.min_8bit_size=256"], {"precision": "bf16"}),
        ("full", ["optimizer=adamw", "optimizer.fused=false"], {"precision": "bf16"}),
        ("full", ["optimizer=custom", "optimizer._target_=torch.optim.RAdam"], {"accumulation": 3}),
        ("full", ["optimizer=custom", "optimizer._target_=torch.optim.Adagrad"], {"clip": 0.1}),
        ("full", ["optimizer=custom", "optimizer._target_=bitsandbytes.optim.Lion"], {"clip_each": 0.01}),
        ("full", ["optimizer=adamw"], {"accumulation": 2, "clip": 0.1, "checkpointing": "full"}),
        ("full", ["optimizer=muon", "optimizer.no_decay=[norms,embeddings]"], {"accumulation": 2}),
        ("lora", ["optimizer=adamw", "optimizer.loraplus_lr_ratio=8"], {"accumulation": 2, "clip": 0.1}),
        ("qlora", ["optimizer=adamw8bit", "optimizer.min_8bit_size=64"], {"precision": "bf16"}),
        ("full", ["optimizer=adamw"], {"precision": "bf16_stochastic"}),
        ("full", ["optimizer=adamw8bit"], {"precision": "bf16_stochastic", "accumulation": 2, "clip": 0.1}),
        ("full", ["optimizer=adamw"], {"precision": "amp_fp16", "clip": 1.0}),
        ("full", ["optimizer=adamw"], {"in_backward": True}),
        ("lora", ["optimizer=sgd"], {"in_backward": True, "clip_each": 0.01, "checkpointing": "selective"}),
        ("full", ["optimizer=adamw"], {"in_backward": True, "precision": "bf16_stochastic"}),
    ],
    ids=str,
)
def test_equals_the_ordinary_loop(method: str, optimizer: list[str], words: dict[str, Any]) -> None:
    ordinary, offloaded = Run(False, method, optimizer, **words), Run(True, method, optimizer, **words)
    start = {name: value.clone() for name, value in trainable(ordinary.model).items()}
    places = {name: value.data_ptr() for name, value in trainable(offloaded.model).items()}
    expected = ordinary.train(STEPS)
    assert numbers(offloaded.train(STEPS)) == numbers(expected)
    assert any(step.skipped for step in expected) is (words.get("precision") == "amp_fp16")
    assert_equal(offloaded, ordinary)
    moved = [name for name, value in trainable(offloaded.model).items() if not torch.equal(value, start[name])]
    assert len(moved) > len(start) / 2  # bf16 rounds some updates away
    assert {name: value.data_ptr() for name, value in trainable(offloaded.model).items()} == places
    assert all(p.grad is None for p in offloaded.model.parameters())


def test_every_optimizer_without_pages_is_among_them() -> None:
    assert len(OPTIMIZERS) >= 8
    assert {"adamw", "sgd", "adafactor", "muon", "adamw8bit", "lion8bit", "ademamix8bit"} <= set(OPTIMIZERS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "words"),
    [("adamw", {}), ("adamw8bit", {"accumulation": 2}), ("muon", {}), ("adamw", {"precision": "bf16_stochastic"})],
    ids=str,
)
@pytest.mark.parametrize("order", [(True, True), (True, False), (False, True)], ids=str)
def test_checkpoints_are_the_ordinary_ones(
    optimizer: str, words: dict[str, Any], order: tuple[bool, bool], tmp_path: Path
) -> None:
    """Stopped and continued, each part in either way, is never stopped."""
    whole = Run(False, "full", [f"optimizer={optimizer}"], **words)
    expected = numbers(whole.train(STEPS))
    keys = Checkpoints("auto", None, None, False, 1, 0, False, "stop", True, False)
    first, second = (Run(offloaded, "full", [f"optimizer={optimizer}"], **words) for offloaded in order)
    before = numbers(first.train(2))
    CheckpointStore(tmp_path, keys).save(first.state, None)
    assert CheckpointStore(tmp_path, keys).restore(second.state, STEPS)
    assert before + numbers(second.train(STEPS)) == expected
    assert_equal(second, whole)


def test_what_something_else_writes_to_the_parameters_is_stepped() -> None:
    ordinary, offloaded = Run(False), Run(True)
    for run in (ordinary, offloaded):
        run.train(2)
        with torch.no_grad():
            run.model.model.norm.weight.mul_(1.5)
        run.model.layers[0].mlp.up_proj.weight.data = torch.ones(160, 32)  # type: ignore[union-attr]
        run.train(4)
    assert_equal(offloaded, ordinary)


class CountsOnce(torch.optim.SGD):
    """Counts its steps for all parameters, as some optimizers do whose parameters know of each other."""

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
        return super().step(closure)


def test_an_optimizer_of_another_library_steps_all_at_once() -> None:
    words = ["optimizer=custom", f"optimizer._target_={__name__}.CountsOnce"]
    ordinary, offloaded = Run(False, optimizer=words), Run(True, optimizer=words)
    for run in (ordinary, offloaded):
        run.train(3)
        assert run.state.optimizer.param_groups[0]["count"] == 3
    assert_equal(offloaded, ordinary)


def test_few_gradients_are_on_their_way_at_a_time() -> None:
    run = Run(True, portion_bytes=1)  # a portion is a parameter
    run.train(3)
    assert run.link.most == len(list(run.model.parameters()))  # when the optimizer was made: weights
    run.link.most = 0
    run.train(STEPS)
    assert run.link.most == AHEAD + 1


def test_portions_are_of_a_size_and_hold_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (1, 1, 3, 4, 1, 2)]
    calls: list[list[int]] = []

    class Records(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            calls.append([p.numel() for group in self.param_groups for p in group["params"] if p.grad is not None])
            return super().step(closure)

    monkeypatch.setattr(offloaded_optimizer, "ONE_BY_ONE", (f"{__name__}.",))
    place = OnHost(parameters, SlowLink(), portion_bytes=16)
    with place.there():
        optimizer = Records(parameters, lr=1.0)
    place.step_there(optimizer)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[3].grad = None
    optimizer.step()
    assert calls == [[1, 1, 3], [1, 2]]
    assert [float(p.detach().sum()) for p in parameters] == [-1, -1, -3, 0, -1, -2]


def test_an_optimizer_that_is_not_made_leaves_the_parameters_where_they_are() -> None:
    parameter = nn.Parameter(torch.ones(3))
    place = parameter.data_ptr()

    def refused() -> None:
        assert parameter.data_ptr() != place
        assert torch.equal(parameter, torch.ones(3))
        raise ConfigError("optimizer.lr")

    with pytest.raises(ConfigError), OnHost([parameter], SlowLink()).there():
        refused()
    assert parameter.data_ptr() == place


def test_on_a_cpu_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory\.offload_optimizer=true: the run is on the CPU"):
        MemoryTechniques("none", False, False, True).require(torch.device("cpu"))
    MemoryTechniques("none", False, False, True).require(torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"memory\.offload_optimizer=true: the run is on the CPU"):
        tuner.estimate(tuner.compose(["model=tiny", "memory.offload_optimizer=true", "estimate.device=cpu"]))


@pytest.fixture
def cpu_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[SlowLink]:
    """Runs in this process take a CPU for a device with memory of its own; the links that they make."""
    links: list[SlowLink] = []

    def link(device: torch.device) -> SlowLink:
        links.append(SlowLink())
        return links[-1]

    monkeypatch.setattr("tuner.memory.default.CudaLink", link)
    monkeypatch.setattr(MemoryTechniques, "require", lambda self, device: None)
    return links


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["peft=full", "precision=bf16_stochastic", "train.gradient_accumulation_steps=2"],
        ["peft=lora", "optimizer=adamw8bit", "memory.optimizer_in_bwd=true", "train.clip_grad_norm=null"],
    ],
    ids=lambda words: words[0],
)
def test_a_run_that_is_stopped_and_goes_on_leaves_the_files_of_one_without(
    words: list[str], cpu_as_a_gpu: list[SlowLink], tmp_path: Path
) -> None:
    common = ["model=tiny", "train.num_samples=0", "logger=none", "schedule=constant", "data.max_seq_len=64", *words]

    def run(name: str, *more: str) -> tuner.Summary:
        return tuner.run(tuner.compose([*common, f"out={tmp_path / name}", *more]))

    plain = run("plain", "train.max_steps=4")
    assert not cpu_as_a_gpu
    run("offloaded", "memory.offload_optimizer=true", "train.max_steps=2")
    found = run("offloaded", "memory.offload_optimizer=true", "train.max_steps=4")
    assert len(cpu_as_a_gpu) == 2
    assert (found.steps, found.val_loss, found.train_loss) == (4, plain.val_loss, plain.train_loss)
    results = "model/model.safetensors" if "peft=full" in words else "adapter/adapter_model.safetensors"
    assert (tmp_path / "offloaded" / results).read_bytes() == (tmp_path / "plain" / results).read_bytes()
