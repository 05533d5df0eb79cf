"""Import of a library that talks, and works, more than needed while it is imported.

`bitsandbytes` 0.50 does three things at import that nobody asked for; they are held back for the time of the import:

- It decorates four fallback kernels with `torch.compile`, which imports dynamo and inductor: 2.1 s on a 2-core machine
  instead of 0.03 s. (Dynamo, the first half of it, comes anyway with the first optimizer or operator that is called.)
  The fallbacks serve devices without native kernels and then run as they are written, uncompiled.
- It asks the `kernels` package, where installed, for code from the Hugging Face Hub: a network access, for an inference
  kernel that training never calls.
- It warns that this package is missing.

What it says about its own native library (missing, of another CUDA version) is left to be heard.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tuner.errors import TunerError


def import_bitsandbytes() -> ModuleType:
    """The module `bitsandbytes`, imported without its noise; afterwards this costs a dictionary look-up.

    Raises:
        TunerError: if it is not installed, with the command that does so.
    """
    if "bitsandbytes" not in sys.modules:
        with _uncompiled(), _no_hub_kernels(), _unheard("bitsandbytes.backends.cpu.ops"):
            return _load("bitsandbytes")
    return _load("bitsandbytes")


def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise TunerError(
            f"{name} is not installed, and 4-bit weights and 8-bit optimizers need it: pip install {name}"
        ) from error


@contextmanager
def _uncompiled() -> Iterator[None]:
    """`torch.compile` returns the function it is given."""
    import torch

    def compile_nothing(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return function if function is not None else compile_nothing

    original = torch.compile
    torch.compile = compile_nothing  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


@contextmanager
def _no_hub_kernels() -> Iterator[None]:
    """`import kernels` fails as it does where the package is not installed."""
    if "kernels" in sys.modules:  # imported by someone who wants it: leave it alone
        yield
        return
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]


@contextmanager
def _unheard(logger_name: str) -> Iterator[None]:
    """The logger says only what is worse than a warning."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
