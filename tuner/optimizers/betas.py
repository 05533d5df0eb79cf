"""The decay rates of the averages that an optimizer keeps."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.errors import ConfigError


def checked(betas: Sequence[float], key: str = "betas") -> tuple[float, float]:
    """`betas` as a plain tuple, which checkpoints can hold.

    Args:
        betas: of the average of the gradient, and of that of its squares.
        key: which of the optimizer's keys they are.

    Raises:
        ConfigError: if they are not two numbers, each at least 0 and below 1.
    """
    first, second = _within(key, betas, "two", [0.9, 0.999])
    return first, second


def checked_three(betas: Sequence[float], t_beta3: int | None) -> tuple[float, float, float]:
    """The three of AdEMAMix.

    Args:
        betas: of the fast average, of the squares, and of the slow average.
        t_beta3: steps over which the third grows from the first, on a scale of logarithms.

    Raises:
        ConfigError: as `checked`; or there are such steps, and no logarithm.
    """
    first, second, third = _within("betas", betas, "three", [0.9, 0.999, 0.9999])
    if t_beta3 is not None and 0.0 in (first, third):
        raise ConfigError(f"optimizer.t_beta3={t_beta3} optimizer.betas={list(betas)}: no way from or to a rate of 0")
    return first, second, third


def _within(key: str, betas: Sequence[float], number: str, example: list[float]) -> list[float]:
    values = [float(beta) for beta in betas]
    if len(values) != len(example) or not all(0.0 <= beta < 1.0 for beta in values):
        raise ConfigError(f"optimizer.{key}={list(betas)}: must be {number} numbers, each >= 0 and < 1, as {example}")
    return values
