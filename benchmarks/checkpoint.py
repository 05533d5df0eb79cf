"""What does saving cost a run: how long does training pause, how long does the writing last, how large is it?

Trains SmolLM2-135M on pydoc with the parts that `python -m tuner` makes of the words, saving every so many steps. Three
numbers a row: the pause (the time that `save` keeps the training thread, the copying of the state; with
`asynchronous=false` the writing too), how much longer than the median the steps take behind which something is written,
and both together as a share of the wall time. The first save and the last step's writing count too.

    python benchmarks/checkpoint.py lora --steps 60
    python benchmarks/checkpoint.py full --steps 100
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout this file is of, installed or not


@dataclass(frozen=True)
class Row:
    """A kind of training: the words for it, and the steps between saves."""

    words: tuple[str, ...]
    every: int


ROWS = {
    "lora": Row(("peft=lora", "precision=bf16"), 20),
    "qlora": Row(("peft=qlora", "precision=bf16"), 20),
    "full": Row(("peft=full", "precision=fp32"), 100),
}


@dataclass
class Measured:
    """Seconds, and bytes of a checkpoint."""

    pauses: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    beside_writing: list[bool] = field(default_factory=list)
    wall: float = 0.0
    size: int = 0


def train(row: Row, steps: int, asynchronous: bool, out: Path) -> Measured:
    """Steps and saves as `tuner.train.fit` makes them, without evaluations."""
    from tuner.config import compose, freeze
    from tuner.loop import training_steps
    from tuner.train import prepare

    words = [*row.words, f"train.max_steps={steps}", "train.num_samples=0", "logger=none", f"out={out}"]
    cfg = freeze(compose([*words, f"checkpoint.asynchronous={asynchronous}".lower()]))
    parts = prepare(cfg, out)
    found, began = Measured(), time.perf_counter()
    with parts.checkpoints as checkpoints:
        for step in training_steps(
            parts.state, parts.schedule, total_steps=steps, clip_grad_norm=1.0, device=parts.device
        ):
            found.steps.append(step.seconds)
            found.beside_writing.append(checkpoints.is_writing)
            checkpoints.problems()
            if step.number % row.every == 0:
                before = time.perf_counter()
                folder = checkpoints.save(parts.state, None)
                found.pauses.append(time.perf_counter() - before)
    found.wall = time.perf_counter() - began
    found.size = sum(file.stat().st_size for file in folder.iterdir())
    return found


def line(name: str, row: Row, found: Measured, asynchronous: bool) -> str:
    """A row of the table."""
    beside = [s for s, writing in zip(found.steps, found.beside_writing, strict=True) if writing]
    alone = [s for s, writing in zip(found.steps, found.beside_writing, strict=True) if not writing]
    median = statistics.median(alone)
    slower = sum(seconds - median for seconds in beside)
    pause = sum(found.pauses)
    last = found.wall - sum(found.steps) - pause  # what is left to write when the last step has been made
    share = 100 * (pause + max(slower, 0.0) + last) / found.wall
    kind = "behind the steps" if asynchronous else "before the next step"
    return (
        f"| {name} | {kind} | {len(found.pauses)} in {len(found.steps)} steps, every {row.every} |"
        f" {found.size / 2**20:.1f} | {median:.2f} | {1000 * statistics.median(found.pauses):.0f} | {len(beside)} |"
        f" {100 * pause / found.wall:.2f} % | {share:.2f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=ROWS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--also-synchronous", action="store_true")
    args = parser.parse_args()
    import torch

    print(f"- Hardware: {os.cpu_count()} cores, {platform.system()}; load before: {os.getloadavg()[0]:.1f}")
    print(f"- Versions: Python {platform.python_version()}, torch {torch.__version__}")
    print(f"- Command: `python benchmarks/checkpoint.py {shlex.join(sys.argv[1:])}`\n")
    columns = (
        "written | saves | MiB | step s | pause ms, median | steps beside writing | pauses | pauses and slower steps"
    )
    print(f"| training | {columns} |\n|---|---|---|---:|---:|---:|---:|---:|---:|")
    for name in args.rows:
        for asynchronous in (True, False) if args.also_synchronous else (True,):
            with tempfile.TemporaryDirectory() as folder:
                found = train(ROWS[name], args.steps, asynchronous, Path(folder))
            print(line(name, ROWS[name], found, asynchronous), flush=True)


if __name__ == "__main__":
    main()
