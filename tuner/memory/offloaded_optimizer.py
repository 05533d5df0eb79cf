"""Optimizer state on the host: an optimizer steps copies of the parameters there, and the GPU holds none of its state.

There is one optimizer, the ordinary one over the ordinary parameters, so its state dict and its checkpoints are the
ordinary ones. Whenever it looks at a parameter, when it is made, steps or loads its state, the parameter's data is the
copy on the host; an optimizer makes its state where its parameter is. Source of the idea: Ren et al., ZeRO-Offload
(arXiv:2101.06840).

A step is a pipeline of portions: gradients leave the device ahead of the portion that is stepped, and new values go
back behind it. Copies begin when the whole gradient is there and clipped, not within backward: the CPU's arithmetic
takes longer than either copy, so they are hidden beside it just as well. Clipping, accumulation and the scale of the
loss then stay where they are, on the device. `docs/decisions/offloaded_optimizer.md` weighs torchao's form.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

PORTION_BYTES = 2**26
"""Of parameters that are stepped at once, at least: below it the calls take longer than the arithmetic."""

AHEAD = 2
"""Portions whose gradients are on their way out, or there, before they are stepped."""

ONE_BY_ONE = ("torch.optim.", "bitsandbytes.", "tuner.")
"""Modules of optimizers that step each parameter by itself. Another one may count its steps once for all."""


class Link(Protocol):
    """Copies between a device and memory of its host; `tuner.memory.cuda_copies` does so beside the computation."""

    def like(self, device_tensor: Tensor) -> Tensor:
        """Memory on the host for a copy of it, with no values as yet."""

    def begin_out(self, device_tensor: Tensor, host_tensor: Tensor) -> Any:
        """Begin to copy to the host; both are to stay until `end_out` has got what it returns."""

    def end_out(self, begun: Any) -> None:
        """Wait until the copy is there."""

    def begin_back(self, host_tensor: Tensor, device_tensor: Tensor) -> None:
        """Begin to copy to the device, behind all that reads there what was there before."""

    def end_back(self) -> None:
        """Let what is computed on the device from now on come behind these copies."""


class Here:
    """An optimizer that stays with its parameters: does nothing."""

    def there(self) -> AbstractContextManager[None]:
        return nullcontext()

    def step_there(self, optimizer: torch.optim.Optimizer) -> None:
        pass


class OnHost:
    """Copies of parameters in memory of the host, for an optimizer to step.

    Args:
        parameters: all that the optimizer has.
        link: copies.
        portion_bytes: of parameters that are stepped at once, at least.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], link: Link, portion_bytes: int = PORTION_BYTES) -> None:
        self._link = link
        self._twins = [_Twin(parameter, link.like(parameter.data)) for parameter in parameters]
        self._portion_bytes = portion_bytes

    @contextmanager
    def there(self) -> Iterator[None]:
        """In the block the parameters are their copies, to be read: what is written to them is not kept."""
        begun = [self._link.begin_out(twin.parameter.data, twin.host) for twin in self._twins if twin.is_behind]
        for each in begun:
            self._link.end_out(each)
        for twin in self._twins:
            twin.to_host()
        try:
            yield
        finally:
            for twin in self._twins:
                twin.to_device()

    def step_there(self, optimizer: torch.optim.Optimizer) -> None:
        """Let `optimizer` step the copies and load its state beside them from now on.

        Args:
            optimizer: made within `there`. Its step may be wrapped already; what wraps it works on the host too.
        """
        plain_step, plain_load = optimizer.step, optimizer.load_state_dict
        by_itself = f"{type(optimizer).__module__}.".startswith(ONE_BY_ONE)
        portions = list(self._portions()) if by_itself else [self._twins]

        def load_state_dict(saved: Mapping[str, Any]) -> None:
            with self.there():
                plain_load(dict(saved))

        optimizer.step = lambda: self._step(plain_step, portions)  # type: ignore[method-assign, assignment]
        optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign, assignment]

    def _portions(self) -> Iterator[list[_Twin]]:
        portion: list[_Twin] = []
        for twin in self._twins:
            portion.append(twin)
            if sum(each.host.nbytes for each in portion) >= self._portion_bytes:
                yield portion
                portion = []
        yield portion

    def _step(self, plain_step: Callable[[], Any], portions: Sequence[Sequence[_Twin]]) -> None:
        """Step what has a gradient; afterwards nothing has one."""
        waiting = deque([moved for portion in portions if (moved := [_Gradient(t) for t in portion if t.has_gradient])])
        leaving: deque[list[_Gradient]] = deque()
        while waiting or leaving:
            while waiting and len(leaving) <= AHEAD:
                leaving.append(waiting.popleft())
                for gradient in leaving[-1]:
                    gradient.begin_out(self._link)
            portion = leaving.popleft()
            for gradient in portion:
                gradient.end_out(self._link)
            plain_step()
            for gradient in portion:
                gradient.twin.back(self._link)
        self._link.end_back()


class _Twin:
    """A parameter and its copy on the host."""

    def __init__(self, parameter: nn.Parameter, host: Tensor) -> None:
        self.parameter, self.host = parameter, host
        self._device_data: Tensor = parameter.data
        self._copied: tuple[int, int] | None = None

    @property
    def is_behind(self) -> bool:
        """Whether something else than a step has written to the parameter since, as a checkpoint that is restored."""
        return self._copied != self._values

    @property
    def _values(self) -> tuple[int, int]:
        """Of the parameter on the device, other ones whenever it has other values: autograd counts what is written."""
        return self.parameter._version, self.parameter.data_ptr()

    @property
    def has_gradient(self) -> bool:
        return self.parameter.grad is not None

    def to_host(self) -> None:
        """Let the parameter be its copy, which has its values by now."""
        self._device_data = self.parameter.data
        self._copied = self._values
        self.parameter.data = self.host

    def to_device(self) -> None:
        self.parameter.data = self._device_data

    def back(self, link: Link) -> None:
        """Bring what was stepped to the device, where the parameter is from now on."""
        self.parameter.grad = None
        link.begin_back(self.host, self._device_data)
        self.to_device()
        self._copied = self._values


class _Gradient:
    """A gradient on its way to the host; taken from its parameter, for an optimizer steps what has one."""

    def __init__(self, twin: _Twin) -> None:
        self.twin = twin
        self._device: Tensor | None = twin.parameter.grad
        twin.parameter.grad = None

    def begin_out(self, link: Link) -> None:
        assert self._device is not None
        self._host = link.like(self._device)
        pairs = [(self._device, self._host)]
        pairs += [(self.twin.parameter.data, self.twin.host)] if self.twin.is_behind else []
        self._begun = [link.begin_out(device, host) for device, host in pairs]

    def end_out(self, link: Link) -> None:
        """Wait for it, free it on the device, and give it to the parameter, which is its copy from now on."""
        for each in self._begun:
            link.end_out(each)
        self._device = None
        self.twin.to_host()
        self.twin.parameter.grad = self._host
        del self._host
