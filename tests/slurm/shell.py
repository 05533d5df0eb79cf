"""Sweeps on the cluster of these tests, and what they leave."""

from __future__ import annotations

import csv
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.end_to_end.conftest import Done, Shell
from tests.slurm.cluster import Cluster

TINY = ["model=tiny", "train.num_samples=0", "train.val_every_steps=null"]
# Three nodes share this machine: threads that spin while they wait would take its cores from the others.
SLURM = ["hydra/launcher=slurm", "hydra.launcher.setup=['export OMP_WAIT_POLICY=passive']", "hydra.launcher.poll_s=0.5"]


class ClusterShell(Shell):
    """Commands in a shell from which jobs are submitted."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        super().__init__(folder)
        self.cluster = cluster
        self.env |= cluster.environment() | {"OMP_WAIT_POLICY": "passive"}

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, text=True, check=True)
        return done.stdout

    def sweep(self, name: str, *words: str) -> subprocess.Popen[str]:
        data = self.data if not any(word.startswith("data.path=") for word in words) else self.data[:1] + self.data[2:]
        return self.start("-m", *TINY, *data, *SLURM, f"hydra.sweep.dir={self.folder / name}", *words)

    def job_of(self, trial: Path) -> str:
        """The job that runs a trial, from what its process printed."""
        for printed in (trial.parent / ".submitit").glob("*/*/*_log.out"):
            if f"trial {trial.name}:" in printed.read_text():
                return printed.parent.name
        raise AssertionError(f"no job runs {trial}")


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def until(found: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + 120
    while not (value := found()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def begun(folder: Path, steps: int = 2) -> list[Path]:
    """The trials that have trained for a few steps."""
    files = folder.glob("*/metrics.jsonl")
    return sorted(file.parent for file in files if len(file.read_text().splitlines()) > steps)


def children(shell: ClusterShell, folder: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{shell.folder / 'mlflow.db'}")
    parent = json.loads((folder / "mlflow.json").read_text())["run_id"]
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    return [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]


def writer_of(file: Path) -> int:
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if entry.resolve() == file.resolve():
                return int(entry.parts[2])
        except OSError:
            continue
    raise AssertionError(f"nobody writes {file}")


def best_command(done: Done, more: str) -> str:
    (line,) = [line for line in done.out.splitlines() if line.startswith("best ")]
    return f"{line.removeprefix('best').strip()} {more}"
