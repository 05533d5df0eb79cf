"""Scaling of the loss, so that gradients too small for float16 are not lost on their way through the model.

A float16 number below 6e-8 is zero, and much of a gradient is smaller. The loss is multiplied with a large factor
before backward, and the finished gradients, in fp32, are divided by it. Where they overflow the factor is too large:
that step is left out and the factor halved; after many good steps it is doubled. Source: Micikevicius et al., Mixed
Precision Training (arXiv:1710.03740). The rule is that of `torch.amp.GradScaler`, which is not used because it waits
for a flag from the GPU to find an overflow: the loop reads the norm of the gradient anyway, and that says the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

SMALLEST = 1.0
"""A gradient that is not finite at this factor would not be without one either."""


@dataclass
class LossScale:
    """The factor and how long it has been good.

    Attributes:
        value: the factor; powers of two, from which halving and doubling leads nowhere else, cost no rounding.
        growth_interval: steps without overflow after which it is doubled.
        good_steps: since it was changed.
    """

    value: float
    growth_interval: int
    good_steps: int = 0

    def unscale_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the factor, in place."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1.0 / self.value)

    def count(self, *, overflowed: bool) -> None:
        """Halve the factor after a step that overflowed; double it after enough that did not."""
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.value = max(self.value / 2, SMALLEST)
        elif self.good_steps == self.growth_interval:
            self.value, self.good_steps = self.value * 2, 0

    @property
    def can_shrink(self) -> bool:
        return self.value > SMALLEST

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over factor and count; the interval stays that of the configuration."""
        self.value, self.good_steps = state["value"], state["good_steps"]
