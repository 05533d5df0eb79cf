"""`hydra/launcher=slurm` on a real cluster without accounting: arrays, failures, cancelling."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Done
from tests.slurm.cluster import Cluster
from tests.slurm.shell import SLURM, TINY, ClusterShell, begun, children, results, until, writer_of


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> ClusterShell:
    return ClusterShell(tmp_path_factory.mktemp("sweeps"), cluster)


@pytest.fixture(scope="module")
def grid(shell: ClusterShell) -> tuple[Done, Path]:
    """A sweep of three ranks and two optimizers, with further options of `sbatch` and a command before each trial."""
    axes = ["peft.lora_rank=2,4,8", "optimizer=adamw,sgd", "train.max_steps=4"]
    resources = ["hydra.launcher.gpus=1", "hydra.launcher.cpus=1", "hydra.launcher.memory_gib=0.75"]
    commands = f"['export OMP_WAIT_POLICY=passive', 'echo ready >> {shell.folder}/said']"
    further = ["+hydra.launcher.sbatch.comment=mine", f"hydra.launcher.setup={commands}"]
    return shell.end(shell.sweep("grid", *axes, *resources, *further)), shell.folder / "grid"


def test_a_grid_is_one_array_that_finishes(shell: ClusterShell, grid: tuple[Done, Path]) -> None:
    done, folder = grid
    assert done.code == 0, done.err
    rows = results(folder)
    assert [row["status"] for row in rows] == ["finished"] * 6
    assert {(row["peft.lora_rank"], row["optimizer"]) for row in rows} == {
        (rank, optimizer) for rank in ("2", "4", "8") for optimizer in ("adamw", "sgd")
    }
    ids = submitted(done)
    assert len({job.split("_")[0] for job in ids}) == 1
    assert [job.split("_")[1] for job in ids] == list("012345")
    assert [run.info.status for run in children(shell, folder)] == ["FINISHED"] * 6
    configs = [(folder / row["trial"] / "config.yaml").read_text() for row in rows]
    assert all("num_threads: 1" in config for config in configs)


def test_further_options_and_commands_reach_the_job(shell: ClusterShell, grid: tuple[Done, Path]) -> None:
    done, _ = grid
    assert (shell.folder / "said").read_text() == "ready\n" * 6
    for job in submitted(done):
        shown = shell.ask("scontrol", "show", "job", job)
        assert "Comment=mine" in shown
        assert "mem=768M" in shown


def submitted(done: Done) -> list[str]:
    """The jobs of a sweep, as it says them."""
    (line,) = [line for line in done.out.splitlines() if line.startswith("submitted to SLURM: ")]
    return line.split(": ")[1].split(", ")


@dataclass(frozen=True)
class Broken:
    """A sweep of eight trials that trains for ever, of which none finishes, each for its own reason.

    Attributes:
        done: how the command ended.
        folder: of the sweep.
        cancelled, killed, late, last: the trials with good data. `late` had no time left, `last` began when another one
            had made room and was cancelled too.
    """

    done: Done
    folder: Path
    cancelled: Path
    killed: Path
    late: Path
    last: Path


@pytest.fixture(scope="module")
def broken(shell: ClusterShell, cluster: Cluster) -> Broken:
    (shell.folder / "bad.jsonl").write_text("no JSON\n")
    folder = shell.folder / "broken"
    good = next(word for word in shell.data if word.startswith("data.path="))
    words = [f"{good},bad.jsonl", "seed=0,1,2,3", "train.max_steps=100000", "hydra.launcher.max_parallel=3"]
    process = shell.sweep("broken", *words, "checkpoint.every_steps=null")
    running = until(lambda: len(begun(folder)) == 3 and begun(folder), process)
    late, cancelled, killed = running
    cluster.exhaust_time(shell.job_of(late))
    array = shell.job_of(late).split("_")[0]
    shell.ask("scancel", f"{array}_7")  # waits for its turn, and has bad data
    shell.ask("scancel", shell.job_of(cancelled))
    os.kill(writer_of(killed / "metrics.jsonl"), signal.SIGKILL)
    last = until(lambda: [trial for trial in begun(folder) if trial not in running], process)[0]
    shell.ask("scancel", shell.job_of(last))
    return Broken(shell.end(process), folder, cancelled, killed, late, last)


def test_one_that_raises_one_that_is_killed_and_cancelled_ones_cost_the_others_nothing(
    shell: ClusterShell, broken: Broken
) -> None:
    done, folder = broken.done, broken.folder
    assert done.code == 1
    rows = {row["trial"]: row for row in results(folder)}
    assert len(rows) == 8
    for trial in (broken.cancelled, broken.last):
        assert (rows[trial.name]["status"], "stopped by SIGTERM" in rows[trial.name]["reason"]) == ("stopped", True)
        assert list((trial / "checkpoints").glob("step-*"))
    assert rows[broken.killed.name]["status"] == "failed"
    assert "left no result; SLURM: " in rows[broken.killed.name]["reason"]
    failed = [row for row in rows.values() if row["status"] == "failed"]
    assert sorted(reason_of(row) for row in failed) == ["bad data"] * 3 + ["killed", "vanished"]
    logs = [Path(line.split("log ", 1)[1]) for line in done.out.splitlines() if line.strip().startswith("log ")]
    assert sum("not valid JSON" in log.read_text() for log in logs) == 3
    statuses = sorted(run.info.status for run in children(shell, folder))
    assert statuses == ["FAILED"] * 5 + ["KILLED"] * 3


def test_a_job_over_its_time_limit_has_saved(broken: Broken) -> None:
    (row,) = [row for row in results(broken.folder) if row["trial"] == broken.late.name]
    assert row["status"] == "stopped"
    assert "stopped by SIG" in row["reason"]
    assert list((broken.late / "checkpoints").glob("step-*"))


def reason_of(row: dict[str, str]) -> str:
    words = {"not valid JSON": "bad data", "SLURM: ": "killed", "no longer knows it": "vanished"}
    return next(name for text, name in words.items() if text in row["reason"])


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
def test_what_slurm_refuses_is_said_in_its_words_before_anything_is_written(
    word: str, shell: ClusterShell, cluster: Cluster
) -> None:
    jobs = ("squeue", "--noheader", "--states=all", "--format=%i")  # not their states: some are still ending
    before = shell.ask(*jobs)
    folder = shell.folder / "refused"
    words = [*SLURM, f"hydra.sweep.dir={folder}", "seed=0,1", word]
    done = shell.inside("-m", *TINY, *shell.data, *words, **cluster.environment())
    assert done.code == 2
    assert done.err.startswith("error: hydra/launcher=slurm: ")
    assert REFUSED[word] in done.err
    assert len(done.err.splitlines()) == 1
    assert not folder.exists()
    assert shell.ask(*jobs) == before
