"""What does a sweep cost beyond the training itself, a trial, by launcher?

Runs the same small grid of the tiny model with `hydra/launcher=basic`, `local` and `slurm` (where there is a cluster),
a trial at a time, and takes apart where the seconds go, from what each trial's process leaves behind:

- start: from the command, or the end of the trial before, to the first line of the trial's process (queue, Python,
  submitit, unpickling);
- imports: of everything a trial's process imports, those at first use included (PyTorch imports its compiler when an
  optimizer is made), measured in a process that runs one trial;
- model and data: `seconds_to_first_step` of the summary less the first evaluation;
- tracking and saving: from the last step to `summary.json`.

`python benchmarks/sweep.py [--trials 4] [--launchers basic local slurm]`
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["model=tiny", "train.max_steps=5", "train.num_samples=0", "train.val_every_steps=null", "data=alpaca"]
IMPORTS = """
import builtins, sys, time
depth, spent, real = 0, 0.0, builtins.__import__
def timed(*args, **words):
    global depth, spent
    depth, started = depth + 1, time.perf_counter()
    try:
        return real(*args, **words)
    finally:
        depth -= 1
        spent += 0.0 if depth else time.perf_counter() - started
builtins.__import__ = timed
import contextlib, io, pathlib, submitit.core._submit, hydra_plugins.tuner_sweeper
from sweeper.trial import run_trial
with contextlib.redirect_stdout(io.StringIO()):
    run_trial(pathlib.Path(sys.argv[1]))
print(spent)
"""
"""Runs a trial and prints the seconds that all its imports took, those at first use included."""
PYTHON = "pass"  # nothing: the process itself


@dataclass(frozen=True)
class Costs:
    """Seconds a trial: `beyond` is what is neither training, nor process start, nor imports."""

    whole: float
    training: float
    process: float
    imports: float
    prepare: float
    tracking: float

    @property
    def beyond(self) -> float:
        return self.whole - self.training - self.process - self.imports


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def seconds_of(code: str, folder: Path, trial: Path | None = None) -> float:
    """Median of three fresh processes: what `code` prints, or how long a process takes that prints nothing.

    Args:
        code: of the process.
        folder: that it works in.
        trial: its argument, a trial's folder; what was found there is taken away first.
    """
    taken = []
    for _ in range(3):
        for entry in [] if trial is None else trial.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in ("config.yaml", "overrides.yaml"):
                entry.unlink()
        command = [sys.executable, "-c", code, *([] if trial is None else [str(trial)])]
        started = time.perf_counter()
        done = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True, check=True)
        taken.append(float(done.stdout) if done.stdout.strip() else time.perf_counter() - started)
    return statistics.median(taken)


def sweep(launcher: str, trials: int, folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the whole command, and the trials' summaries with their training seconds."""
    rows = [{"instruction": f"Add {i} to 3.", "input": "", "output": f"It is {i + 3}."} for i in range(60)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.path={folder / 'sums.jsonl'}", f"seed={','.join(map(str, range(trials)))}"]
    words += [f"hydra/launcher={launcher}", f"hydra.sweep.dir={folder / launcher}"]
    words += ["hydra.launcher.max_parallel=1"] if launcher != "basic" else []
    words += ["hydra.launcher.poll_s=0.5"] if launcher == "slurm" else []
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "tuner", "-m", *WORDS, *words],
        env=environment(),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    seconds = time.perf_counter() - started
    found = []
    for file in (folder / launcher).glob("*/summary.json"):
        summary = json.loads(file.read_text())
        lines = [json.loads(line) for line in (file.parent / "metrics.jsonl").read_text().splitlines()]
        steps = [line["time"] for line in lines if "train/loss" in line]
        summary["training_s"] = (steps[-1] - steps[0]) * len(steps) / (len(steps) - 1)
        summary["after_s"] = file.stat().st_mtime - steps[-1]
        found.append(summary)
    return seconds, found


def costs(launcher: str, trials: int, folder: Path) -> Costs:
    """Two sweeps, of one trial and of several: their difference is free of what a sweep costs once."""
    one, _ = sweep(launcher, 1, folder)
    shutil.rmtree(folder / launcher)
    many, found = sweep(launcher, trials, folder)
    in_process = launcher == "basic"

    def mean(name: str) -> float:
        return statistics.fmean(summary[name] for summary in found)

    return Costs(
        whole=(many - one) / (trials - 1),
        training=mean("training_s"),
        process=0.0 if in_process else 2 * seconds_of(PYTHON, folder),  # submitit's controller or srun, and the task
        imports=0.0
        if in_process
        else seconds_of(IMPORTS, folder, next(iter((folder / launcher).glob("*/adapter"))).parent),
        prepare=mean("seconds_to_first_step"),
        tracking=mean("after_s"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What a sweep costs beyond training, a trial.")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--launchers", nargs="+", default=["basic", "local", "slurm"])
    arguments = parser.parse_args()
    print(f"- Python {platform.python_version()}, {os.cpu_count()} cores, {arguments.trials} trials, one at a time\n")
    columns = ["launcher", "a trial", "training", "process start", "imports", "model, data, first evaluation"]
    columns += ["after the last step", "beyond start, imports, training"]
    print("| " + " | ".join(columns) + " |\n|---|" + "---:|" * (len(columns) - 1))
    for launcher in arguments.launchers:
        if launcher == "slurm" and shutil.which("sbatch") is None:
            print("| slurm | no sbatch here |")
            continue
        with tempfile.TemporaryDirectory() as folder:
            c = costs(launcher, arguments.trials, Path(folder))
        cells = [c.whole, c.training, c.process, c.imports, c.prepare, c.tracking, c.beyond]
        print(f"| {launcher} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
