"""How long does the main job take, how much does it learn, and how much memory does it need?

Runs `python -m tuner peft=qlora precision=bf16` as a person would, in an empty folder of its own, and reads what it
left in `summary.json`. Further words are handed on: `python benchmarks/main_job.py train.max_steps=20`.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JOB = ["-m", "tuner", "peft=qlora", "precision=bf16"]
COLUMNS = (
    "command",
    "seconds in all",
    "before the first step",
    "val loss before",
    "val loss after",
    "fall",
    "peak MiB",
    "tokens/s",
)


def run_job(words: list[str]) -> tuple[float, dict[str, Any]]:
    """Seconds from the command to its end, start of Python included, and the run's summary.

    Raises:
        CalledProcessError: the job failed; what it printed has been shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, *JOB, f"out={out}", *words],
            cwd=folder,  # where mlflow.db goes
            env={**os.environ, "PYTHONPATH": path},
            stdout=sys.stderr,
            check=True,
        )
        seconds = time.perf_counter() - started
        return seconds, json.loads((out / "summary.json").read_text(encoding="utf-8"))


def line(words: list[str], seconds: float, summary: dict[str, Any]) -> str:
    """One row of the table."""
    before, after = summary["val_loss_before"], summary["val_loss"]
    # What the run itself cannot see: imports and composing; closing too, so the start is at most what is printed.
    start = seconds - summary["seconds"]
    cells = [
        f"`python {shlex.join([*JOB, *words])}`",
        f"{seconds:.1f}",
        f"{start + summary['seconds_to_first_step']:.1f}",
        f"{before:.4f}",
        f"{after:.4f}",
        f"{1 - after / before:.1%}",
        f"{summary['peak_memory_mib']:.0f}",
        f"{summary['tokens_per_s']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    words = sys.argv[1:]
    seconds, summary = run_job(words)
    print(f"- Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}\n")
    print("| " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * (len(COLUMNS) - 1))
    print(line(words, seconds, summary))


if __name__ == "__main__":
    main()
