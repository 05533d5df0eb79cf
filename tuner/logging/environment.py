"""What a run was made in: versions, machine and commits, for `environment.json`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "tuner",
    "torch",
    "bitsandbytes",
    "hydra-core",
    "omegaconf",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "mlflow",
    "submitit",
    "numpy",
    "transformers",
    "peft",
    "gguf",
    "wandb",
    "tensorboard",
)


def environment() -> dict[str, Any]:
    """Versions (null: not installed), platform, processors, memory, git commits (null: no checkout) and job id."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "hostname": platform.node(),
        "cpu": _cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "gpus": _gpu_names(),
        "tuner_commit": _commit(Path(__file__).resolve().parents[2]),
        "cwd_commit": _commit(Path.cwd()),
        "cwd": str(Path.cwd()),
        "command": sys.argv,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")  # a run has imported it; importing it only to write this file costs seconds
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _commit(folder: Path) -> str | None:
    """The commit checked out in `folder`, with `-dirty` where tracked files differ from it."""
    if not (folder / ".git").exists():
        return None  # a package inside another project's virtual environment must not be given that project's commit
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None  # git is not installed, or the file system is too slow to ask
    return found.stdout.strip() or None
