"""What SLURM says of jobs, asked of `squeue`: accounting (`sacct`) is a part that many clusters lack."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class QueueState:
    """A job as the queue shows it: `name` is SLURM's word (RUNNING, TIMEOUT, ...), `reason` why it waits or ended."""

    name: str
    reason: str

    @property
    def ended(self) -> bool:
        return self.name in ENDED


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


def cancel(jobs: Iterable[str]) -> None:
    """`scancel`; jobs that have ended meanwhile are no error."""
    subprocess.run(["scancel", "--quiet", *jobs], capture_output=True, check=False, timeout=ASK_S)
