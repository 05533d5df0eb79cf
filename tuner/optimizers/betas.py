"""The two decay rates of the Adam family."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.errors import ConfigError


def checked(betas: Sequence[float]) -> tuple[float, float]:
    """`betas` as a plain tuple, which checkpoints can hold.

    Raises:
        ConfigError: if they are not two numbers, each at least 0 and below 1.
    """
    values = tuple(float(beta) for beta in betas)
    if len(values) != 2 or not all(0.0 <= beta < 1.0 for beta in values):
        raise ConfigError(f"optimizer.betas={list(betas)}: must be two numbers, each >= 0 and < 1, as [0.9, 0.999]")
    return values
