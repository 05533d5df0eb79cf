"""Memory techniques on a GPU: the gradients of none of them, and less memory allocated at most."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import tuner
from tuner.build import build_model, build_optimizer, load_base
from tuner.config import compose
from tuner.estimating.devices import of_machine
from tuner.estimating.predicting import Predictor
from tuner.estimating.shapes import FakeBatches
from tuner.estimating.tracing import Constant
from tuner.loop import add_gradients, training_steps
from tuner.memory.cuda_copies import CudaLink
from tuner.memory.default import MemoryTechniques
from tuner.models.decoder import Decoder
from tuner.models.llama import LlamaConfig
from tuner.optimizers.groups import trained
from tuner.peft.full import Full
from tuner.peft.lora import LoRA
from tuner.types import Batch, Precision, State
from tuner.verbs.estimate import plan_of

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
T = 1024
TECHNIQUES = {
    "none": ("none", False),
    "selective": ("selective", False),
    "full": ("full", False),
    "offloaded": ("none", True),
    "full-offloaded": ("full", True),
}


def built(method: str, technique: str, dtype: str, *, in_backward: bool = False) -> tuple[Decoder, MemoryTechniques]:
    base = load_base(LlamaConfig.from_hugging_face(SHAPE, None), getattr(torch, dtype), torch.device("cuda"), 0)
    torch.manual_seed(0)
    lora = LoRA("lora", 8, 16, 0.0, ["q_proj", "k_proj", "v_proj", "output_proj"], True, False, False)
    checkpointing, offloading = TECHNIQUES[technique]
    memory = MemoryTechniques(checkpointing, offloading, in_backward, False)  # type: ignore[arg-type]
    memory.require(torch.device("cuda"))
    peft = Full("full") if method == "full" else lora
    model = build_model(base, peft, Precision(dtype, dtype), memory)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.02)
    return model, memory


def measured(
    method: str, technique: str, dtype: str, documents: list[list[int]] | None
) -> tuple[dict[str, Tensor], int]:
    """Loss and gradients of the second of two passes, whose memory is warm, and the most bytes beyond the model's."""
    model, _ = built(method, technique, dtype)
    tokens = torch.randint(0, 512, (4, T), generator=torch.Generator().manual_seed(1)).cuda()
    batch = Batch(tokens, tokens, documents=documents)
    for _ in range(2):
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (loss,) = add_gradients(model, [batch])
        torch.cuda.synchronize()
    found = {"loss": loss, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
    return found, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("documents", [None, [[600, 400]] * 4], ids=["texts", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_same_gradients_in_less_memory(method: str, dtype: str, documents: list[list[int]] | None) -> None:
    plain, most = measured(method, "none", dtype, documents)
    bytes_of = {"none": most}
    for technique in [name for name in TECHNIQUES if name != "none"]:
        found, bytes_of[technique] = measured(method, technique, dtype, documents)
        assert found.keys() == plain.keys()
        for name, value in plain.items():
            # The same kernels on the same numbers; those of attention and embeddings add in no fixed order.
            assert (found[name] - value).norm() <= (1e-5 if dtype == "float32" else 2e-2) * value.norm(), (
                technique,
                name,
            )
    assert bytes_of["full"] < bytes_of["selective"] < bytes_of["none"]
    assert bytes_of["offloaded"] < 0.7 * bytes_of["none"]
    assert bytes_of["full-offloaded"] < bytes_of["full"]


def test_offloaded_memory_is_right_when_copies_are_slower_than_the_computation() -> None:
    """Many passes without a synchronisation between them: memory that is given up early would be written over."""
    expected = gradients_of_many("none")
    for found, value in zip(gradients_of_many("offloaded"), expected, strict=True):
        assert (found - value).norm() <= 1e-5 * value.norm()


def gradients_of_many(technique: str) -> list[Tensor]:
    model, _ = built("lora", technique, "float32")
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 512, (2, T), generator=generator).cuda() for _ in range(10)]
    add_gradients(model, [Batch(tokens, tokens) for tokens in batches])
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["AdamW", "PagedAdamW8bit"])
def test_steps_in_backward_equal_those_behind_it_and_hold_one_gradient(name: str) -> None:
    from tuner.optimizers.custom import custom
    from tuner.optimizers.groups import trained

    weights, most = [], []
    for in_backward in (False, True):
        model, memory = built("full", "full", "float32", in_backward=in_backward)
        library = "torch" if name == "AdamW" else "bitsandbytes"
        optimizer = custom(f"{library}.optim.{name}", trained(model), {"lr": 1e-3}, [])
        stepped = memory.steps_in_backward(optimizer, None)
        tokens = torch.randint(0, 512, (1, 64), generator=torch.Generator().manual_seed(1)).cuda()
        for _ in range(3):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            add_gradients(model, [Batch(tokens, tokens)])
            if stepped is None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            else:
                assert torch.isfinite(stepped.grad_norm())
        most.append(torch.cuda.max_memory_allocated() - before)
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        size = sum(p.numel() * 4 for p in model.parameters())
    for key, value in weights[0].items():
        # Adam's steps are of about the rate, also where a gradient is no larger than its rounding.
        assert (weights[1][key] - value).norm() <= 1e-2 * 3 * 1e-3 * value.numel() ** 0.5, key
    assert most[1] < most[0] - 0.7 * size


WORDS = ["optimizer=adamw", "optimizer=adamw8bit", "optimizer=muon"]


class Offloaded:
    """A model that trains on the GPU.

    Args:
        words: of the optimizer.
        where: the optimizer is; `gpu` is without offloading.
        in_backward: step each parameter there.
    """

    def __init__(self, words: str, *, where: Literal["host", "gpu"], in_backward: bool = False) -> None:
        base = load_base(LlamaConfig.from_hugging_face(SHAPE, None), torch.float32, torch.device("cuda"), 0)
        memory = MemoryTechniques("none", False, in_backward, where == "host")
        self.model = build_model(base, Full("full"), Precision("fp32", "float32"), memory)
        trains = trained(self.model)
        place = memory.place_of_optimizer([one.param for one in trains])
        with place.there():
            self.optimizer = build_optimizer(compose([words, "optimizer.lr=1e-3"]).optimizer, trains, [])
        self.in_backward = memory.steps_in_backward(self.optimizer, None)
        place.step_there(self.optimizer)
        self.batches = batches()

    def train(self, steps: int) -> None:
        """Several steps without a synchronisation but those of the steps themselves."""
        for _ in range(steps):
            add_gradients(self.model, [next(self.batches)])
            if self.in_backward is None:
                self.optimizer.step()

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}


def batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(0, 512, (1, 64), generator=generator).cuda()
        yield Batch(tokens, tokens)


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("in_backward", [False, True], ids=["behind", "in backward"])
def test_an_offloaded_optimizer_steps_as_its_kernels_for_a_cpu_do(words: str, in_backward: bool) -> None:
    """Bit for bit: each step's gradients, made on the GPU, are given to an ordinary optimizer of CPU copies."""
    run = Offloaded(words, where="host", in_backward=in_backward)
    twins = {name: nn.Parameter(value.cpu()) for name, value in run.parameters().items()}
    trains = [one._replace(param=twins[one.name]) for one in trained(run.model)]
    reference = build_optimizer(compose([words, "optimizer.lr=1e-3"]).optimizer, trains, [])
    gradients: dict[str, Tensor] = {}

    def keep(name: str, gradient: Tensor) -> None:
        gradients[name] = gradient.cpu()

    for name, parameter in run.model.named_parameters():
        parameter.register_hook(partial(keep, name))  # its whole gradient, before anything is done with it
    for _ in range(4):
        run.train(1)
        for name, twin in twins.items():
            twin.grad = gradients[name]
        reference.step()
        for name, value in run.parameters().items():
            assert value.is_cuda
            assert torch.equal(value.cpu(), twins[name]), name


def test_state_and_gradients_of_an_offloaded_optimizer_are_not_on_the_gpu() -> None:
    allocated = {}
    for where in ("gpu", "host"):
        gc.collect()
        before = torch.cuda.memory_allocated()
        run = Offloaded("optimizer=adamw", where=where)  # type: ignore[arg-type]
        run.train(2)
        state = [value for each in run.optimizer.state.values() for value in each.values() if value.numel() > 1]
        assert {value.device.type for value in state} == {"cuda" if where == "gpu" else "cpu"}
        run.model.zero_grad()
        torch.cuda.synchronize()
        allocated[where] = torch.cuda.memory_allocated() - before
        weights = sum(parameter.nbytes for parameter in run.model.parameters())
        del run, state
    assert allocated["gpu"] - allocated["host"] > 1.9 * weights


def test_a_step_on_the_host_allocates_nothing_on_the_gpu() -> None:
    run = Offloaded("optimizer=adamw", where="host")
    run.train(2)
    add_gradients(run.model, [next(run.batches)])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run.optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before
    assert before - torch.cuda.memory_allocated() >= sum(p.nbytes for p in run.model.parameters())  # the gradients


def test_gradients_leave_while_the_gpu_computes_and_parameters_come_back_behind_it() -> None:
    """The GPU is kept busy: a copy that did not wait for it would bring the old gradient, or overwrite what is read."""
    device = torch.device("cuda")
    link = CudaLink(device)
    gradient, host = torch.zeros(2**20, device=device), torch.empty(2**20, pin_memory=True)
    torch.cuda._sleep(10**9)
    gradient.fill_(3.0)
    begun = link.begin_out(gradient, host)
    assert not begun.query()  # it returned at once
    link.end_out(begun)
    assert torch.equal(host, torch.full((2**20,), 3.0))
    read = torch.zeros_like(gradient)
    torch.cuda._sleep(10**9)
    read.copy_(gradient)
    host.fill_(5.0)
    link.begin_back(host, gradient)
    link.end_back()
    after = gradient.clone()
    assert float(read.min()) == float(read.max()) == 3.0
    assert float(after.min()) == float(after.max()) == 5.0


@pytest.mark.parametrize("order", [("host", "host"), ("host", "gpu"), ("gpu", "host")], ids=str)
def test_state_of_an_offloaded_optimizer_is_loaded_with_and_without(order: tuple[Any, Any]) -> None:
    whole = Offloaded("optimizer=adamw", where=order[0])
    whole.train(4)
    first, second = (Offloaded("optimizer=adamw", where=where) for where in order)
    first.train(2)
    with torch.no_grad():
        for name, parameter in second.model.named_parameters():
            parameter.copy_(first.parameters()[name])
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    kinds = {value.device.type for each in second.optimizer.state.values() for value in each.values()}
    assert kinds == {"cpu" if order[1] == "host" else "cuda"}
    second.batches = first.batches
    second.train(2)
    for name, value in whole.parameters().items():
        # The embedding's gradient adds in no fixed order, and AdamW makes of a small difference of a small one a step.
        assert (second.parameters()[name] - value).norm() <= 1e-3 * value.norm(), name


def test_the_predicted_peak_of_an_offloaded_optimizer_is_measured() -> None:
    words = ["+scale=tiny", "model=llama", "peft=full", "data.max_seq_len=256", "train.batch_size=4"]
    cfg = tuner.freeze(tuner.compose([*words, "device=cuda", "memory.offload_optimizer=true"]))
    device = torch.device("cuda")
    known = of_machine(device)
    plan = plan_of(cfg, known)
    base = load_base(plan.model, torch.float32, device, 0)
    model = build_model(base, plan.peft, plan.precision, plan.memory)
    place = plan.memory.place_of_optimizer([one.param for one in trained(model)])
    with place.there():
        optimizer = plan.make_optimizer(model)
    place.step_there(optimizer)
    state = State(model, optimizer, FakeBatches.of(plan))
    steps = training_steps(state, Constant(), total_steps=2, clip_grad_norm=plan.clip_grad_norm, device=device)
    next(steps)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    next(steps)
    predicted = Predictor(plan, known).peak().total
    assert abs(predicted / torch.cuda.max_memory_allocated() - 1) < 0.05
