"""Paged optimizers of bitsandbytes: what to know of them on a CPU, and state that is paged again after a resume."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor

MOMENTS = ("state1", "state2")

SMALLEST_PAGED = 100_000
"""Elements of a parameter from which on bitsandbytes pages its state (`get_state_buffer`)."""


def set_up_paging(optimizer: Any) -> None:
    """Warn of parameters on a CPU, where there is nowhere to page out to; let loaded state be paged as new state is.

    bitsandbytes loads state into ordinary memory of the GPU: a run that fits only because it is paged would not fit
    once it is resumed.
    """
    if any(parameter.device.type == "cpu" for group in optimizer.param_groups for parameter in group["params"]):
        warnings.warn(
            "optimizer: nothing is paged on a CPU; the optimizer computes the same with its state in ordinary memory",
            stacklevel=3,
        )
        optimizer.would_page = True
        optimizer.is_paged = False  # bitsandbytes would warn again, and page AdEMAMix's averages, which fails on a CPU
        return
    load = optimizer.load_state_dict

    def load_and_page(state_dict: dict[str, Any]) -> None:
        load(state_dict)
        for parameter, state in optimizer.state.items():
            for name in MOMENTS if parameter.numel() >= SMALLEST_PAGED else ():
                if name in state:
                    # of the shape of the state: AdEMAMix keeps two averages in one
                    buffer = optimizer.get_state_buffer(state[name], dtype=state[name].dtype)
                    state[name] = buffer.copy_(state[name])

    optimizer.load_state_dict = load_and_page


def pageable(optimizer: Any) -> Iterator[Tensor]:
    """The state that a paged optimizer keeps, on a GPU, where the driver can move it; none of other optimizers."""
    pages = getattr(optimizer, "is_paged", False) or getattr(optimizer, "would_page", False)
    for parameter, state in optimizer.state.items() if pages else ():
        if parameter.numel() >= SMALLEST_PAGED:
            yield from (state[name] for name in MOMENTS if name in state)
