"""Techniques that trade speed for memory, applied to a model that is otherwise complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from tuner.errors import ConfigError, ModelError
from tuner.keeping import kernel
from tuner.memory.cuda_copies import CudaCopies, CudaLink
from tuner.memory.in_backward import InBackward
from tuner.memory.offloaded_optimizer import Here, OnHost
from tuner.memory.offloading import offload
from tuner.memory.selective import passes

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


class MemoryTechniques:
    """The keys of the `memory` group.

    Args:
        activation_checkpointing: `full` keeps the input of each layer and computes the layer again in backward
            (Chen et al., arXiv:1604.06174): activations of one layer at a time for about a third more compute.
            `selective` keeps the matrix products and the attention of each layer too and computes again what is cheap.
            True and False are taken as `full` and `none`.
        activation_offloading: keep what backward needs, parameters apart, in pinned memory of the host.
        optimizer_in_bwd: step each parameter in backward and free its gradient, so that there is one gradient at a
            time.
        offload_optimizer: step copies of the parameters on the host, where the optimizer's state then is.
    """

    def __init__(
        self,
        activation_checkpointing: bool | Literal["none", "selective", "full"],
        activation_offloading: bool,
        optimizer_in_bwd: bool,
        offload_optimizer: bool,
    ) -> None:
        if isinstance(activation_checkpointing, bool):
            activation_checkpointing = "full" if activation_checkpointing else "none"
        self.activation_checkpointing = activation_checkpointing
        self.activation_offloading = activation_offloading
        self.optimizer_in_bwd = optimizer_in_bwd
        self.offload_optimizer = offload_optimizer

    def require(self, device: torch.device) -> None:
        """Refuse what makes no sense on `device`.

        Raises:
            ConfigError: activations or the optimizer's state are to be moved to the memory where they are.
        """
        if self.activation_offloading and device.type == "cpu":
            raise ConfigError(
                "memory.activation_offloading=true: the run is on the CPU, whose memory they would be moved to; say "
                "memory.activation_offloading=false; memory.activation_checkpointing=full takes less memory here too"
            )
        if self.offload_optimizer and device.type == "cpu":
            raise ConfigError(
                "memory.offload_optimizer=true: the run is on the CPU, whose memory the optimizer's state would be "
                "moved to; say memory.offload_optimizer=false; optimizer=adamw8bit takes less memory here too"
            )

    def place_of_optimizer(self, parameters: Sequence[nn.Parameter]) -> Here | OnHost:
        """Where the optimizer of `parameters`, which are on the device of the run, is made and steps."""
        return OnHost(parameters, CudaLink(parameters[0].device)) if self.offload_optimizer else Here()

    def steps_in_backward(self, optimizer: torch.optim.Optimizer, clip_each: float | None) -> InBackward | None:
        """What steps `optimizer` in backward from now on; None where it is not asked for.

        Args:
            clip_each: largest norm of each parameter's gradient; None leaves it.
        """
        return InBackward(optimizer, clip_each) if self.optimizer_in_bwd else None

    def apply(self, model: nn.Module) -> None:
        """Change `model`, whose `layers` are its transformer blocks, in place; parameters keep their names.

        Raises:
            ModelError: a model without `layers`.
        """
        if self.activation_offloading:
            device = next(model.parameters()).device
            offload(model, partial(CudaCopies, device, torch.cuda.Stream(device)))  # type: ignore[no-untyped-call]
        if self.activation_checkpointing == "none":
            return
        layers = getattr(model, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            key = f"memory.activation_checkpointing={self.activation_checkpointing}"
            raise ModelError(f"{key}: {type(model).__name__} has no list of layers")
        for layer in layers:
            if self.activation_checkpointing == "full":
                _checkpoint(layer, noop_context_fn)
            else:
                _keep_products(layer)
                _checkpoint(layer, passes)


def _keep_products(layer: nn.Module) -> None:
    """Let the plain linear layers keep what they compute; adapted and packed ones do so themselves."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.forward = _kept(module.forward)  # type: ignore[method-assign]


def _kept(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def within(*args: Any, **kwargs: Any) -> Any:
        with kernel():
            return forward(*args, **kwargs)

    return within


def _checkpoint(layer: nn.Module, contexts: Contexts) -> None:
    """Compute `layer` again in backward, while it is training.

    Its forward is replaced and not wrapped in a module of its own, which would rename every parameter.

    Args:
        contexts: of the first pass and of the second.
    """
    forward = layer.forward

    @wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    layer.forward = recomputed
