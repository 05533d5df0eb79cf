"""The same bits from the same run on a GPU, for as long as a run lasts.

PyTorch takes the deterministic one of its algorithms where it has several, and raises where it has none. cuBLAS needs a
workspace of a fixed kind besides, which a process says in its environment before it starts CUDA and not afterwards
(docs.nvidia.com/cuda/cublas, "Results reproducibility").
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tuner.errors import ConfigError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""The kinds that give reproducible results; the first takes 24 MiB of GPU memory and the second is slower."""

_started_so = False
"""Whether CUDA was started in this process under `deterministic`: the environment does not tell afterwards."""


@contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """Compute deterministically on `device` until the block ends, if `wanted`; then all is as the caller had it.

    On a CPU nothing depends on it: the same number of threads gives the same bits anyway.

    Raises:
        ConfigError: CUDA was started in this process without the workspace that cuBLAS needs.
    """
    if not wanted:
        yield
    elif device.type != "cuda":
        with _deterministic_algorithms():
            yield
    else:
        with _reproducible_cublas(), _deterministic_algorithms():
            yield


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    chosen = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark = chosen


@contextmanager
def _reproducible_cublas() -> Iterator[None]:
    global _started_so
    before = os.environ.get(CUBLAS)
    if _cuda_is_started() and before not in WORKSPACES and not _started_so:
        raise ConfigError(
            f"train.deterministic=true: CUDA was started in this process with {CUBLAS}={before or '(not set)'}, and "
            f"cuBLAS reads it no more; set {CUBLAS}={WORKSPACES[0]} before Python starts, or take a process of its own"
        )
    if before not in WORKSPACES:
        os.environ[CUBLAS] = WORKSPACES[0]
    try:
        yield
    finally:
        _started_so = _started_so or _cuda_is_started()
        if before is None:
            del os.environ[CUBLAS]
        else:
            os.environ[CUBLAS] = before


def _cuda_is_started() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
