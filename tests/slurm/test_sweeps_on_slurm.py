"""`hydra/launcher=slurm` on a real cluster without accounting: arrays, failures, cancelling, preemption."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Done, Shell
from tests.slurm.cluster import Cluster

TINY = ["model=tiny", "train.num_samples=0", "train.val_every_steps=null"]
# Three nodes share this machine: threads that spin while they wait would take its cores from the others.
SLURM = ["hydra/launcher=slurm", "hydra.launcher.setup=['export OMP_WAIT_POLICY=passive']", "hydra.launcher.poll_s=0.5"]


class ClusterShell(Shell):
    """Commands in a shell from which jobs are submitted."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        super().__init__(folder)
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


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> ClusterShell:
    return ClusterShell(tmp_path_factory.mktemp("sweeps"), cluster)


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


def test_a_grid_is_one_array_that_finishes(shell: ClusterShell) -> None:
    folder = shell.folder / "grid"
    words = ["peft.lora_rank=2,4,8", "optimizer=adamw,sgd", "train.max_steps=4"]
    done = shell.end(shell.sweep("grid", *words, "hydra.launcher.gpus=1", "hydra.launcher.cpus=1"))
    assert done.code == 0, done.err
    rows = results(folder)
    assert [row["status"] for row in rows] == ["finished"] * 6
    assert {(row["peft.lora_rank"], row["optimizer"]) for row in rows} == {
        (rank, optimizer) for rank in ("2", "4", "8") for optimizer in ("adamw", "sgd")
    }
    (submitted,) = [line for line in done.out.splitlines() if line.startswith("submitted to SLURM: ")]
    ids = submitted.split(": ")[1].split(", ")
    assert len({job.split("_")[0] for job in ids}) == 1
    assert [job.split("_")[1] for job in ids] == list("012345")
    assert [run.info.status for run in children(shell, folder)] == ["FINISHED"] * 6
    configs = [(folder / row["trial"] / "config.yaml").read_text() for row in rows]
    assert all("num_threads: 1" in config for config in configs)


def test_one_that_raises_one_that_is_killed_and_cancelled_ones_cost_the_others_nothing(shell: ClusterShell) -> None:
    (shell.folder / "bad.jsonl").write_text("no JSON\n")
    folder = shell.folder / "broken"
    good = next(word for word in shell.data if word.startswith("data.path="))
    paths = [f"{good},bad.jsonl", "seed=0,1,2,3", "train.max_steps=3000", "hydra.launcher.max_parallel=3"]
    process = shell.sweep("broken", *paths)
    running = until(lambda: len(begun(folder)) == 3 and begun(folder), process)
    array = shell.job_of(running[0]).split("_")[0]
    shell.ask("scancel", f"{array}_7")  # waits for its turn, and has bad data
    cancelled, killed, left = running
    shell.ask("scancel", shell.job_of(cancelled))
    os.kill(writer_of(killed / "metrics.jsonl"), signal.SIGKILL)
    # The third and the fourth would train for long: they are told to stop, which is not a failure.
    fourth = until(lambda: [trial for trial in begun(folder) if trial not in running], process)[0]
    for trial in (left, fourth):
        shell.ask("scancel", shell.job_of(trial))
    done = shell.end(process)
    assert done.code == 1
    rows = {row["trial"]: row for row in results(folder)}
    assert len(rows) == 8
    for trial in (cancelled, left, fourth):
        assert (rows[trial.name]["status"], "stopped by SIGTERM" in rows[trial.name]["reason"]) == ("stopped", True)
        assert list((trial / "checkpoints").glob("step-*"))
    assert rows[killed.name]["status"] == "failed"
    assert "left no result; SLURM: " in rows[killed.name]["reason"]
    failed = [row for row in rows.values() if row["status"] == "failed"]
    assert sorted(reason_of(row) for row in failed) == ["bad data"] * 3 + ["killed", "vanished"]
    logs = [Path(line.split("log ", 1)[1]) for line in done.out.splitlines() if line.strip().startswith("log ")]
    assert sum("not valid JSON" in log.read_text() for log in logs if log.exists()) == 3
    statuses = sorted(run.info.status for run in children(shell, folder))
    assert statuses == ["FAILED"] * 5 + ["KILLED"] * 3


def reason_of(row: dict[str, str]) -> str:
    words = {"not valid JSON": "bad data", "SLURM: ": "killed", "no longer knows it": "vanished"}
    return next(name for text, name in words.items() if text in row["reason"])


def writer_of(file: Path) -> int:
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if entry.resolve() == file.resolve():
                return int(entry.parts[2])
        except OSError:
            continue
    raise AssertionError(f"nobody writes {file}")


def test_a_job_over_its_time_limit_has_saved(shell: ClusterShell, cluster: Cluster) -> None:
    folder = shell.folder / "late"
    process = shell.sweep("late", "train.max_steps=100000", "logger=none", "checkpoint.every_steps=null")
    trial = until(lambda: begun(folder), process)[0]
    cluster.exhaust_time(shell.job_of(trial))
    done = shell.end(process)
    assert done.code == 1
    (row,) = results(folder)
    assert row["status"] == "stopped"
    assert "stopped by SIG" in row["reason"]
    assert list((trial / "checkpoints").glob("step-*"))


def test_a_preempted_trial_goes_on_in_its_folder_and_its_mlflow_run_to_the_same_bits(shell: ClusterShell) -> None:
    folder = shell.folder / "preempted"
    words = ["train.max_steps=400", "hydra.launcher.partition=main", "hydra.launcher.cpus=1", "seed=0,1"]
    process = shell.sweep("preempted", *words)
    until(lambda: len(begun(folder, steps=10)) == 2, process)
    all_nodes = ["--nodes=3", "--ntasks-per-node=4", "--exclusive"]
    shell.ask("sbatch", "--partition=high", *all_nodes, "--output=/dev/null", "--wrap=sleep 1")
    done = shell.end(process)
    assert done.code == 0, done.err
    rows = results(folder)
    assert [row["status"] for row in rows] == ["finished"] * 2
    logs = [(folder / row["trial"] / "run.log").read_text() for row in rows]
    assert all("resumed at step" in log for log in logs)
    runs = children(shell, folder)
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    for row in rows:
        lines = (folder / row["trial"] / "metrics.jsonl").read_text().splitlines()
        steps = [line["step"] for line in map(json.loads, lines) if "train/loss" in line]
        assert steps == list(range(1, 401))
    alone = shell.line(best_command(done, "out=alone logger=none"))
    assert alone.code == 0, alone.err
    summary = json.loads((shell.folder / "alone" / "summary.json").read_text())
    assert summary["val_loss"] == float(rows[0]["val_loss"])


def best_command(done: Done, more: str) -> str:
    (line,) = [line for line in done.out.splitlines() if line.startswith("best ")]
    return f"{line.removeprefix('best').strip()} {more}"


def test_ctrl_c_cancels_the_jobs_which_save(shell: ClusterShell) -> None:
    folder = shell.folder / "stopped"
    process = shell.sweep("stopped", "train.max_steps=100000", "seed=0,1", "logger=none")
    until(lambda: len(begun(folder)) == 2, process)
    process.send_signal(signal.SIGINT)
    done = shell.end(process)
    assert done.code == 130
    assert [row["status"] for row in results(folder)] == ["stopped"] * 2
    assert "continue: python -m tuner -m " in done.err
    array = done.out.split("submitted to SLURM: ")[1].split("_")[0]
    states = shell.ask("squeue", "--noheader", "--states=all", "--array", "--format=%T", f"--jobs={array}").split()
    assert set(states) <= {"CANCELLED", "COMPLETING"}


REFUSED = {
    "hydra.launcher.partition=nowhere": "invalid partition specified: nowhere",
    "hydra.launcher.gpus=9": "Requested node configuration is not available",
    "hydra.launcher.memory_gib=4000": "node configuration is not available",
    "hydra.launcher.constraint=fast": "Invalid feature specification",
    "+hydra.launcher.sbatch.no-such-option=1": "unrecognized option '--no-such-option=1'",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_slurm_refuses_is_said_in_its_words_before_anything_is_written(word: str, shell: ClusterShell) -> None:
    jobs = ("squeue", "--noheader", "--states=all", "--format=%i")  # not their states: some are still ending
    before = shell.ask(*jobs)
    done = shell.end(shell.sweep("refused", "seed=0,1", word))
    assert done.code == 2
    assert done.err.startswith("error: hydra/launcher=slurm: ")
    assert REFUSED[word] in done.err
    assert len(done.err.splitlines()) == 1
    assert not (shell.folder / "refused").exists()
    assert shell.ask(*jobs) == before


def test_further_options_and_commands_reach_the_job(shell: ClusterShell) -> None:
    folder = shell.folder / "options"
    words = [
        "+hydra.launcher.sbatch.comment=mine",
        "train.max_steps=2",
        "logger=none",
        "hydra.launcher.memory_gib=0.75",
    ]
    words.append(f"hydra.launcher.setup=['export OMP_WAIT_POLICY=passive', 'echo ready > {shell.folder}/said']")
    done = shell.end(shell.sweep("options", *words))
    assert done.code == 0, done.err
    assert (shell.folder / "said").read_text() == "ready\n"
    job = done.out.split("submitted to SLURM: ")[1].split()[0]
    shown = shell.ask("scontrol", "show", "job", job)
    assert "Comment=mine" in shown
    assert "mem=768M" in shown
    assert results(folder)[0]["status"] == "finished"
