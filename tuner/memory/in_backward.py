"""The optimizer's step within backward: each parameter is stepped, and its gradient freed, once the gradient is whole.

There is one optimizer, the ordinary one, so its state and its checkpoints are the ordinary ones. Its `step` leaves
parameters without a gradient alone, and when it is called only one has a gradient. One optimizer for each parameter
would not look through all of them each time, at the price of a state of its own kind. Source of the idea: Lv et al.,
LOMO (arXiv:2306.09782).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class InBackward:
    """Steps the parameters of `optimizer` from hooks on their gradients, from now on.

    Args:
        optimizer: of parameters that have no gradient yet.
        clip_each: largest norm of each parameter's gradient; None leaves it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_each: float | None) -> None:
        self._optimizer, self._clip_each = optimizer, clip_each
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._norms: dict[int, Tensor] = {}
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._step)

    def grad_norm(self) -> Tensor:
        """Norm of the whole gradient of the last backward pass before clipping, fp32 of no dimension; it is forgotten.

        NaN without such a pass.
        """
        norms = [self._norms[id(p)] for p in self._parameters if id(p) in self._norms]
        self._norms.clear()
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(torch.nan)

    def _step(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if self._clip_each is None:
            norm = nn.utils.get_total_norm([parameter.grad])
        else:
            norm = nn.utils.clip_grad_norm_(parameter, self._clip_each)
        self._norms[id(parameter)] = norm
        self._optimizer.step()
        parameter.grad = None
