"""What a person should know about paged optimizers on a CPU, in one line."""

from __future__ import annotations

import warnings
from typing import Any


def warn_on_cpu(optimizer: Any) -> None:
    """Warn if parameters of this bitsandbytes optimizer are on a CPU, where there is nowhere to page out to."""
    if any(parameter.device.type == "cpu" for group in optimizer.param_groups for parameter in group["params"]):
        warnings.warn(
            "optimizer: nothing is paged on a CPU; the optimizer computes the same with its state in ordinary memory",
            stacklevel=3,
        )
        optimizer._cpu_paged_warned = True  # bitsandbytes would say it again at the first step, in its own words
