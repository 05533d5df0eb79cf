"""A trial whose job or node is disturbed ends as one that nobody disturbed: same folder, MLflow run and bits.

All in one sweep on a cluster of its own, a trial on each node. How often checkpoints are written is no matter of bits,
so the trials differ in that, and one run without any disturbance is the reference of all.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import Done
from tests.slurm.cluster import Cluster
from tests.slurm.shell import ClusterShell, best_command, children, results, until, writer_of

STEPS = 150
EVERY_STEPS = {"preempted": 7, "requeued": 8, "crashed": 9, "killed": 10, "lost": 11}
"""What is done to a trial, and how often it saves."""
WORDS = [
    f"checkpoint.every_steps={','.join(map(str, EVERY_STEPS.values()))}",
    "checkpoint.every_epoch=false",
    f"train.max_steps={STEPS}",
    "train.val_every_steps=20",
    "hydra.launcher.partition=main",
    "hydra.launcher.gpus=2",  # all of a node
]
DISTURBED = pytest.mark.parametrize("name", EVERY_STEPS)


@dataclass(frozen=True)
class Frozen:
    """A trial that was stopped (SIGSTOP) beyond a checkpoint and has reached MLflow, just before it is disturbed."""

    out: Path
    pid: int
    job: str
    node: str
    run_id: str
    saved: int
    trained: int


@dataclass(frozen=True)
class Disturbed:
    """The sweep, by what was done to its trials.

    Attributes:
        folder: of the sweep.
        first, again: how the command ended, and the same one with `sweep.rerun=failed`.
        after_first: results of the first, by trial.
        trials: as they were before.
        alone: run folder of the same trial that nobody disturbed.
        runs: in MLflow, by trial.
    """

    folder: Path
    first: Done
    after_first: dict[str, dict[str, str]]
    again: Done
    trials: dict[str, Frozen]
    alone: Path


@pytest.fixture(scope="module")
def shell(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterShell]:
    """A node for each trial, and one for whoever lost his."""
    folder = tmp_path_factory.mktemp("disturbed")
    with Cluster(folder / "cluster", nodes=len(EVERY_STEPS) + 1, slurmd_timeout_s=10) as cluster:
        yield ClusterShell(folder, cluster)


@pytest.fixture(scope="module")
def disturbed(shell: ClusterShell) -> Disturbed:
    folder = shell.folder / "sweep"
    process = shell.sweep("sweep", *WORDS)
    pids: dict[str, tuple[Path, int]] = {}
    until(lambda: stop_beyond_checkpoints(folder, pids), process)
    trials = {name: until(partial(frozen, shell, out, pid), process) for name, (out, pid) in pids.items()}
    disturb(shell, trials)
    lost = trials["lost"]
    until(lambda: "another process is at work" in printed(shell, lost.job), process)
    os.kill(lost.pid, signal.SIGCONT)
    first = shell.end(process)
    after_first = {row["trial"]: row for row in results(folder)}
    again = shell.end(shell.sweep("sweep", *WORDS, "sweep.rerun=failed"))
    alone = shell.line(best_command(again, "out=alone logger=none"))
    assert alone.code == 0, alone.err
    return Disturbed(folder, first, after_first, again, trials, shell.folder / "alone")


def stop_beyond_checkpoints(folder: Path, stopped: dict[str, tuple[Path, int]]) -> bool:
    """Stop each trial as soon as it has trained two steps more than it has saved; whether all are stopped."""
    for file in folder.glob("*/metrics.jsonl"):
        out = file.parent
        if (name := name_of(out)) not in stopped and trained(out) >= saved(out) + 2 > 2:
            stopped[name] = (out, writer_of(file))
            os.kill(stopped[name][1], signal.SIGSTOP)
    return len(stopped) == len(EVERY_STEPS)


def frozen(shell: ClusterShell, out: Path, pid: int) -> Frozen | None:
    """What is known of a stopped trial, as soon as the sweep has brought it into MLflow."""
    run_id = json.loads((out / "mlflow.json").read_text())["run_id"]
    if run_id is None:
        return None
    job = shell.job_of(out)
    node = shell.ask("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()
    return Frozen(out, pid, job, node, run_id, saved(out), trained(out))


def disturb(shell: ClusterShell, trials: dict[str, Frozen]) -> None:
    """To each what its name says. SLURM wakes those to which it sends a signal."""
    assert all(trial.trained < STEPS for trial in trials.values()), "one finished before it was disturbed"
    whole_node = [f"--nodelist={trials['preempted'].node}", "--exclusive"]
    shell.ask("sbatch", "--partition=high", *whole_node, "--output=/dev/null", "--wrap=sleep 1")
    shell.ask("scontrol", "requeue", trials["requeued"].job)
    shell.cluster.kill_node(trials["crashed"].node)
    os.kill(trials["killed"].pid, signal.SIGKILL)
    shell.cluster.lose_node(trials["lost"].node)


def name_of(out: Path) -> str:
    every = int(re.findall(r"every_steps: (\d+)", (out / "config.yaml").read_text())[0])
    return next(name for name, steps in EVERY_STEPS.items() if steps == every)


def saved(out: Path) -> int:
    return max((int(folder.name.removeprefix("step-")) for folder in out.glob("checkpoints/step-*")), default=0)


def trained(out: Path) -> int:
    return max((row["step"] for row in rows_of(out)), default=0)


def rows_of(out: Path) -> list[dict[str, Any]]:
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def printed(shell: ClusterShell, job: str) -> str:
    return "".join(file.read_text() for file in (shell.folder / "sweep" / ".submitit").glob(f"*/{job}/*_log.*"))


def test_only_the_killed_one_is_not_finished_by_the_first_command(disturbed: Disturbed) -> None:
    statuses = {name: disturbed.after_first[trial.out.name]["status"] for name, trial in disturbed.trials.items()}
    assert statuses == dict.fromkeys(EVERY_STEPS, "finished") | {"killed": "failed"}, disturbed.first
    assert "left no result; SLURM: FAILED" in disturbed.after_first[disturbed.trials["killed"].out.name]["reason"]
    assert disturbed.first.code == 1
    assert "sweep.rerun=failed" in disturbed.first.out


def test_the_same_command_goes_on_with_the_killed_one_alone(disturbed: Disturbed) -> None:
    assert disturbed.again.code == 0, disturbed.again.err
    assert f"{len(EVERY_STEPS)} trials, 1 to run" in disturbed.again.out
    assert [row["status"] for row in results(disturbed.folder)] == ["finished"] * len(EVERY_STEPS)


@DISTURBED
def test_it_went_on_from_its_own_checkpoint(name: str, disturbed: Disturbed) -> None:
    trial = disturbed.trials[name]
    said = re.findall(r"resumed at step (\d+) of", (trial.out / "run.log").read_text())
    if name == "lost":  # its process was there all the time, and the next one found it finished
        assert said == []
        return
    (step,) = map(int, said)
    if name in ("crashed", "killed"):  # nothing could be saved at the end
        assert 0 < step < trial.trained
        assert step == trial.saved or step == trial.saved + EVERY_STEPS[name]  # that was being written
    else:
        assert step >= trial.trained


@DISTURBED
def test_every_step_is_there_once_with_the_numbers_of_an_undisturbed_run(name: str, disturbed: Disturbed) -> None:
    def exact(out: Path) -> list[dict[str, Any]]:
        measured = ("time", "perf/tokens_per_s", "memory/peak_mib")
        return [{key: value for key, value in row.items() if key not in measured} for row in rows_of(out)]

    rows = exact(disturbed.trials[name].out)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
    assert rows == exact(disturbed.alone)


@DISTURBED
def test_its_adapter_and_its_losses_have_the_bits_of_an_undisturbed_run(name: str, disturbed: Disturbed) -> None:
    def of(out: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
        summary = json.loads((out / "summary.json").read_text())
        numbers = [summary[key] for key in ("val_loss_before", "val_loss", "train_loss", "steps", "tokens")]
        return load_file(out / "adapter" / "adapter_model.safetensors"), numbers

    (tensors, numbers), (expected, expected_numbers) = of(disturbed.trials[name].out), of(disturbed.alone)
    assert numbers == expected_numbers
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors.items())
    assert any(tensor.count_nonzero() for key, tensor in tensors.items() if "lora_B" in key), "it has learnt"


def test_each_is_one_finished_run_in_mlflow(shell: ClusterShell, disturbed: Disturbed) -> None:
    runs = {run.info.run_id: run.info.status for run in children(shell, disturbed.folder)}
    assert runs == {trial.run_id: "FINISHED" for trial in disturbed.trials.values()}


@DISTURBED
def test_mlflow_has_every_step_of_a_metric_once(name: str, shell: ClusterShell, disturbed: Disturbed) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{shell.folder / 'mlflow.db'}")
    run_id = disturbed.trials[name].run_id
    keys = [key for key in client.get_run(run_id).data.metrics if "/" in key and not key.startswith("system/")]
    assert {"train/loss", "val/loss", "perf/tokens_per_s"} <= {*keys}
    for key in keys:
        steps = Counter(point.step for point in client.get_metric_history(run_id, key))
        assert {step: times for step, times in steps.items() if times > 1} == {}, key
        assert max(steps) == STEPS
