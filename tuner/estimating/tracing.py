"""One training step of `tuner.loop` on fake tensors, and what is alive in each part of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from tuner.estimating.counting import PAGED, MemoryCount, Region
from tuner.estimating.devices import Device
from tuner.estimating.inside import inside
from tuner.estimating.moved import MovedOnPaper
from tuner.estimating.shapes import FakeBatches, Plan, adapted, ready, weights_by_kind
from tuner.estimating.worst_case import WorstCase
from tuner.loop import training_steps
from tuner.memory.offloading import offload
from tuner.models.decoder import Decoder
from tuner.optimizers.paging import pageable
from tuner.precision.stochastic_rounding import round_updates
from tuner.types import State

Peaks = dict[Region, dict[str, int]]
"""Of each part of a step, bytes by kind when most is alive."""

BACKWARD: Any = Tensor.backward

PASSING = {"loss": "logits"}
"""What comes and goes, by the phase that made it; elsewhere it is `temporary`."""


class Constant:
    """A schedule that changes nothing."""

    def factor(self, step: int, total_steps: int) -> float:
        return 1.0


def trace(plan: Plan, device: Device) -> Peaks:
    """What is alive in each part of a step that is not the first one: the optimizer has its state.

    The process's random numbers stay as they were.
    """
    count = MemoryCount(device.rounding_bytes, inside(device.kind))
    with torch.random.fork_rng(devices=[]):
        plan.quantization.packed(nn.Linear(64, 64))  # real, as tables that quantizers keep for all layers have to be
        model = adapted(plan)
        with FakeTensorMode(allow_non_fake_inputs=True), count, WorstCase(device.kind):
            ready(model, plan, device.kind)
            if plan.offloads_activations:
                offload(model, partial(MovedOnPaper, count))
            for kind, tensor in weights_by_kind(model):
                count.mark([tensor], kind)
            state = State(model, optimizer_of(model, plan, device), FakeBatches.of(plan))
            if plan.memory.offload_optimizer:
                leave_to_host(state.optimizer)
            elif plan.precision.stochastic_rounding:
                round_updates(state, 0, device.kind)
            in_backward = plan.memory.steps_in_backward(state.optimizer, None)
            make_optimizer_state(state.optimizer, device, count, one_by_one=in_backward is not None)
            steps = training_steps(
                state,
                Constant(),
                total_steps=1,
                clip_grad_norm=plan.clip_grad_norm,
                device=torch.device("cpu"),
                in_backward=in_backward,
            )
            with Phases(count, model):
                next(steps)
            return count.peaks(lambda region: PASSING.get(region[0], "temporary"))


def optimizer_of(model: Decoder, plan: Plan, device: Device) -> torch.optim.Optimizer:
    """The optimizer in the form that it has on `device`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of paged optimizers, that these tensors are on a CPU
        optimizer = plan.make_optimizer(model)
    if device.kind == "cuda":
        of_gpu(optimizer)
    return optimizer


def leave_to_host(optimizer: torch.optim.Optimizer) -> None:
    """Let steps take nothing of the device: state, temporaries and rounding are the host's."""
    optimizer.state.clear()  # what some make at once
    optimizer.step = lambda: None  # type: ignore[method-assign, assignment]


def make_optimizer_state(
    optimizer: torch.optim.Optimizer, device: Device, count: MemoryCount, *, one_by_one: bool
) -> None:
    """A first step, which makes the state; `one_by_one` as parameters are stepped in backward."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with count.within(("first step",)):
        for together in [[each] for each in trained] if one_by_one else [trained]:
            for parameter in together:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    count.mark_alive("optimizer_state", lambda region: region == ("first step",))
    if device.kind == "cuda":
        count.mark(pageable(optimizer), PAGED)


def of_gpu(optimizer: torch.optim.Optimizer) -> None:
    """Choose PyTorch's form for parameters on a GPU where it has a choice (`foreach=None`): all of them at once, with
    temporaries as large as all of them."""
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True


class Phases(TorchFunctionMode):
    """Tells the count which part of a step it is in, by hooks on the model and at the call of `backward`.

    Parts are `before`, `forward`, `loss`, `backward` and `step`, those of forward and backward divided by layers; with
    them the number of the batch.
    """

    def __init__(self, count: MemoryCount, model: Decoder) -> None:
        super().__init__()
        self._count, self._model = count, model
        self._batch = -1
        count.region = ("before",)
        model.model.embed_tokens.register_forward_pre_hook(self._begin)
        model.model.embed_tokens.register_forward_hook(self._embedded)
        for index, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(self._entering(index))
            layer.register_forward_hook(self._leaving(index))
        model.model.norm.register_forward_hook(self._end)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not BACKWARD:
            return func(*args, **(kwargs or {}))
        self._count.mark_alive("activations", lambda region: region[0] == "loss")
        self._enter("backward", "head")
        func(*args, **(kwargs or {}))
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        self._count.mark(gradients, "gradients")
        self._enter("step")
        return None

    def _enter(self, phase: str, *part: str) -> None:
        self._count.region = (phase, str(self._batch), *part)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._batch += 1
        self._enter("forward", "embedding")

    def _embedded(self, module: nn.Module, args: Any, out: Tensor) -> None:
        _at_gradient(out, lambda: self._enter("backward", "embedding"))

    def _entering(self, index: int) -> Any:
        return lambda module, args: self._enter("forward", "layer", str(index))

    def _leaving(self, index: int) -> Any:
        def leaving(module: nn.Module, args: Any, out: Tensor) -> None:
            _at_gradient(out, lambda: self._enter("backward", "layer", str(index)))

        return leaving

    def _end(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self._count.mark_alive("activations", lambda region: region[0] == "forward")
        self._enter("loss")


def _at_gradient(out: Tensor, call: Callable[[], None]) -> None:
    """Call when the gradient of `out` is there, which is when what made it begins its backward pass."""
    if out.requires_grad:
        out.register_hook(lambda gradient: call())  # type: ignore[no-untyped-call]
