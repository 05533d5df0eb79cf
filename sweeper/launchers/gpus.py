"""The GPUs of this machine in sets, without importing torch."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess

_IS_GPU = re.compile(r"\d+$|GPU-|MIG-")


def visible_gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` may list: its own entries if it is set, else an index a GPU that the driver shows."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        entries = [entry.strip() for entry in given.split(",")]
        return list(itertools.takewhile(_IS_GPU.match, entries))  # CUDA too ends its list at the first other entry
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(index) for index, _ in enumerate(line for line in lines if line.startswith("GPU "))]


def sets_of(gpus: list[str], size: int) -> list[list[str]]:
    """As many disjoint sets of `size` as there are."""
    return [gpus[start : start + size] for start in range(0, len(gpus) - size + 1, size)] if size else []
