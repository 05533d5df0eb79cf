"""What SLURM says of jobs, asked of `squeue`: accounting (`sacct`) is a part that many clusters lack."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sweeper.errors import JobDied

ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
"""States that a job does not leave again; one that is requeued shows PENDING or REQUEUED instead."""

ASK_S = 30.0
"""How long the controller may take to answer."""
ASK_TIMES, ASK_AGAIN_S = 10, 0.5
"""While a job ends, the controller now and then knows nothing of it."""
KILL_S = 900.0
"""How long a job that is preempted may wait for its end: partitions give up to minutes of grace."""


@dataclass(frozen=True)
class QueueState:
    """A job as the queue shows it: `name` is SLURM's word (RUNNING, TIMEOUT, ...), `reason` why it waits or ended."""

    name: str
    reason: str

    @property
    def ended(self) -> bool:
        return self.name in ENDED


def refusal(script: str) -> str | None:
    """Why SLURM would not take a batch script, in its own words; None if it would. Nothing is submitted."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        command = ["sbatch", "--test-only", file.name]
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ASK_S)
    return None if asked.returncode == 0 else "; ".join(asked.stderr.strip().splitlines())


def queue_states() -> dict[str, QueueState] | None:
    """Every job of this user that the controller still knows, ended ones too, by id (`12`, or `12_3` in an array).

    None if the controller gave no answer; it may be restarting, so that says nothing about a job.
    """
    command = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%r"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ASK_S)
    except subprocess.TimeoutExpired:
        return None
    if asked.returncode != 0:
        return None
    fields = [line.split("|", 2) for line in asked.stdout.splitlines() if line.count("|") >= 2]
    return {job.strip(): QueueState(name.strip(), reason.strip()) for job, name, reason in fields}


def own_job() -> str:
    """The id of the job this process is in. `SLURM_JOB_ID` of one task of an array is the id of the whole array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def preempted_here() -> bool:
    """Whether SLURM takes this process's job off its node and is to start it again, asked within the job.

    While the grace time of its partition lasts, the job is RUNNING and the controller shows when the preemption began;
    after it, as after `scontrol requeue`, the job is in the queue already. Neither is so at a job's time limit or when
    somebody cancels it, and then it must not be started again, which `scontrol requeue` would do.

    Raises:
        JobDied: the controller says nothing.
    """
    fields = _own_fields()
    in_grace = fields["JobState"] in ("RUNNING", "SIGNALING") and fields.get("PreemptTime", "None") != "None"
    return in_grace or _in_the_queue(fields)


def start_again() -> None:
    """Put this process's job into the queue, unless it is there; SLURM then kills it, so nothing comes after this.

    Raises:
        JobDied: it was not killed.
    """
    if not _in_the_queue(_own_fields()):  # where it has begun on another node, it would be stopped there
        subprocess.run(["scontrol", "requeue", own_job()], capture_output=True, check=False, timeout=ASK_S)
    time.sleep(KILL_S)
    raise JobDied(f"SLURM preempted job {own_job()} and neither killed it nor started it again")


def _own_fields() -> dict[str, str]:
    """What the controller shows of this process's job, by its own names.

    Raises:
        JobDied: nothing, however often it is asked.
    """
    for _ in range(ASK_TIMES):
        command = ["scontrol", "--oneliner", "show", "job", own_job()]
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ASK_S)
        fields = dict(word.split("=", 1) for word in asked.stdout.split() if "=" in word)
        if "JobState" in fields:
            return fields
        time.sleep(ASK_AGAIN_S)
    raise JobDied(f"told to stop, and SLURM does not say why of job {own_job()}: {asked.stderr.strip()}")


def _in_the_queue(fields: Mapping[str, str]) -> bool:
    """Whether the job is in the queue already, or was since: it counts one start more than this process knows."""
    return int(fields.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0))


def cancel(jobs: Iterable[str]) -> None:
    """`scancel`; jobs that have ended meanwhile are no error."""
    subprocess.run(["scancel", "--quiet", *jobs], capture_output=True, check=False, timeout=ASK_S)
