"""The devices that a run's memory is predicted for: the one table of what they have."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from tuner.errors import ConfigError, nearest
from tuner.types import DeviceType

MIB = 2**20
GIB = 2**30
CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """What decides how much memory a run takes and whether it fits.

    Attributes:
        kind: which kernels run.
        memory_bytes: of the whole device.
        dtypes: it computes in, of those a precision may ask for.
        rounding_bytes: the allocator hands out multiples of this.
        workspace_bytes: what cuBLAS takes of the allocator at its first product.
        reserved_bytes: what is not the allocator's to give: the CUDA context with its kernels, and of a CPU's memory
            the interpreter with its libraries.
    """

    kind: DeviceType
    memory_bytes: int
    dtypes: tuple[str, ...]
    rounding_bytes: int
    workspace_bytes: int
    reserved_bytes: int


def _gpu(memory_bytes: float, capability: int) -> Device:
    """A GPU: bfloat16 from compute capability 8 on; PyTorch's allocator rounds to 512 bytes, and its choice for
    cuBLAS is 32 MiB from capability 9 on and 8.1 MiB before."""
    dtypes = ("float32", "float16", "bfloat16") if capability >= 8 else ("float32", "float16")
    workspace = 32 * MIB if capability >= 9 else 8 * MIB + 128 * 1024
    return Device("cuda", int(memory_bytes), dtypes, 512, workspace, 600 * MIB)


def devices() -> dict[str, Device]:
    """By the names that `estimate.device` takes. The memory of a GPU is what its driver gives (`nvidia-smi`)."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "h200": _gpu(140.4 * GIB, 9),
        "h100": _gpu(79.6 * GIB, 9),
        "a100_80": _gpu(79.2 * GIB, 8),
        "a100_40": _gpu(39.4 * GIB, 8),
        "l40s": _gpu(44.5 * GIB, 8),
        "a10": _gpu(22.0 * GIB, 8),
        "l4": _gpu(22.0 * GIB, 8),
        "rtx4090": _gpu(23.5 * GIB, 8),
        "rtx3090": _gpu(23.7 * GIB, 8),
        "t4": _gpu(14.6 * GIB, 7),
        CPU: Device("cpu", memory, ("float32", "float16", "bfloat16"), 1, 0, 450 * MIB),
    }


def deterministic(device: Device) -> Device:
    """A device on which a run says `train.deterministic`: cuBLAS then has eight pieces of 4 MiB."""
    return device if device.kind == "cpu" else replace(device, workspace_bytes=32 * MIB)


def of_machine(device: torch.device) -> Device:
    """A GPU that is here."""
    there = torch.cuda.get_device_properties(device)
    return _gpu(there.total_memory, there.major)


def device_named(name: str) -> Device:
    """The device of this name.

    Raises:
        ConfigError: there is none; with the table.
    """
    known = devices()
    if name not in known:
        table = [f"  {each}: {one.memory_bytes / GIB:.1f} GiB, {', '.join(one.dtypes)}" for each, one in known.items()]
        raise ConfigError([f"estimate.device={name}: no such device; {nearest(name, known)}", *table])
    return known[name]
