"""`hydra/launcher=slurm`: jobs as one array through submitit's SLURM executor.

submitit asks `sacct` how a job fares and, on a cluster without accounting, waits for ever for one that died. Here a
job has ended when its result is there, or when the queue says so and no result has come.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from sweeper.errors import JobDied, SubmissionRefused
from sweeper.launchers.jobs import Job, failed, import_path, job_folder, jobs_of, result_in
from sweeper.launchers.slurm_queue import QueueState, cancel, preempted_here, queue_states, refusal, start_again
from tuner.errors import ConfigError
from tuner.types import NonNegativeInt, PositiveFloat, PositiveInt

LOOK_S = 0.2
RESULT_S = 10.0
"""How long after a job's end its result may take to show on a network file system."""
LOST_S = 30.0
"""How long a job may be missing from the queue, without a result, before it is given up: a task of an array that is
cancelled before it began vanishes at once."""
USUAL = ("None", "Resources", "Priority", "BeginTime", "JobArrayTaskLimit")
"""Why a job may wait without anybody having to do something about it."""
PATIENCE_S = 60.0
"""How long cancelled jobs may take to end."""


class SlurmJob(Job):
    """A job that goes on in the same folder after another one has taken its node."""

    def interrupted(self, stopped: KeyboardInterrupt) -> JobReturn:
        """Leaves no result if SLURM starts it again."""
        if preempted_here():
            print("preempted; SLURM starts this job again", file=sys.stderr, flush=True)
            start_again()
        return super().interrupted(stopped)


@dataclass
class _Submitted:
    """A job on its way; `since` is when its state was first seen to be the end, or it was first missed."""

    job: Job
    submitit: Any
    since: float | None = None


class SlurmLauncher(Launcher):
    """A SLURM job array; sbatch's own words explain each option (https://slurm.schedmd.com/sbatch.html).

    Args:
        partition, account, qos, constraint: None for the cluster's defaults.
        gpus, cpus: of each job.
        memory_gib: of each job; None for the cluster's default.
        time_min: longest time of a job in minutes.
        signal_before_end_s: a job gets SIGUSR2 this long before its time is up.
        max_parallel: jobs at once; None for as many as the cluster gives.
        sbatch: further options by name.
        setup: shell commands before each job.
        poll_s: how often the queue is asked.

    Raises:
        ConfigError: there is no `sbatch` here.
    """

    on_other_machines = True
    """Jobs may see other files than this process; said here because Hydra makes plugin classes anew when it looks for
    them, so `isinstance` does not tell launchers apart."""

    def __init__(
        self,
        partition: str | None,
        account: str | None,
        qos: str | None,
        constraint: str | None,
        gpus: NonNegativeInt,
        cpus: PositiveInt,
        memory_gib: PositiveFloat | None,
        time_min: PositiveInt,
        signal_before_end_s: NonNegativeInt,
        max_parallel: PositiveInt | None,
        sbatch: dict[str, str | int | float | bool],
        setup: list[str],
        poll_s: PositiveFloat,
    ) -> None:
        for program in ("sbatch", "srun", "squeue", "scancel"):
            if shutil.which(program) is None:
                raise ConfigError(
                    f"hydra/launcher=slurm: no {program} on the PATH; run this where jobs are submitted, or say "
                    "hydra/launcher=local"
                )
        path = import_path()
        self.cpus_of_each = cpus
        self.max_parallel = max_parallel
        self.poll_s = poll_s
        given = {
            "partition": partition,
            "account": account,
            "qos": qos,
            "constraint": constraint,
            "gpus_per_node": gpus or None,
            "mem": None if memory_gib is None else f"{round(memory_gib * 1024)}M",
            "additional_parameters": {"requeue": True, **sbatch},
        }
        self.parameters = {
            **{name: value for name, value in given.items() if value is not None},
            "job_name": "tuner",
            "cpus_per_task": cpus,
            "time": time_min,
            "signal_delay_s": signal_before_end_s,
            "setup": [*setup, f"export OMP_NUM_THREADS={cpus}", *([f"export PYTHONPATH='{path}'"] if path else [])],
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Also asks SLURM whether it would take such a job, so that nothing is written for one that it refuses.

        Raises:
            SubmissionRefused: in SLURM's words.
        """
        self.context, self.task, self.config = hydra_context, task_function, config
        if problem := refusal(self._executor()._make_submission_file_text("true", "")):
            raise SubmissionRefused(f"hydra/launcher=slurm: {problem}")

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit all as one array and wait; one that fails or dies costs the others nothing.

        Raises:
            SubmissionRefused: in SLURM's words; nothing was submitted.
            KeyboardInterrupt: after the jobs were cancelled and have saved.
        """
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = jobs_of(SlurmJob, self.context, self.task, self.config, job_overrides, initial_job_idx)
        submitted = self._submit(jobs)
        returns: dict[int, JobReturn] = {}
        asked = 0.0
        said: set[tuple[str, str]] = set()
        try:
            while len(returns) < len(submitted):
                states = None
                if time.monotonic() - asked >= self.poll_s:
                    states, asked = queue_states(), time.monotonic()
                    _say_why_they_wait([one.submitit.job_id for one in submitted], states or {}, said)
                for index, one in enumerate(submitted):
                    if index not in returns and (result := _end_of(one, states)) is not None:
                        returns[index] = result
                time.sleep(LOOK_S)
        except KeyboardInterrupt:
            _cancel([one for index, one in enumerate(submitted) if index not in returns])
            raise
        return [returns[index] for index in range(len(submitted))]

    def _executor(self) -> Any:
        from submitit import SlurmExecutor

        executor = SlurmExecutor(job_folder(self.config), max_num_timeout=0)
        executor.update_parameters(**self.parameters)
        return executor

    def _submit(self, jobs: Sequence[Job]) -> list[_Submitted]:
        from submitit.core.utils import FailedJobError

        executor = self._executor()
        executor.update_parameters(array_parallelism=self.max_parallel or len(jobs))
        try:
            with executor.batch():
                submitted = [executor.submit(job) for job in jobs]
        except FailedJobError as error:
            said = [line.strip() for line in str(error).splitlines() if "sbatch: error" in line] or [str(error).strip()]
            raise SubmissionRefused(f"hydra/launcher=slurm: {'; '.join(said)}") from error
        print(f"submitted to SLURM: {', '.join(one.job_id for one in submitted)}", flush=True)
        return [_Submitted(job, one) for job, one in zip(jobs, submitted, strict=True)]


def _say_why_they_wait(ids: Sequence[str], states: Mapping[str, QueueState], said: set[tuple[str, str]]) -> None:
    """A line the first time a job waits for something that may never come, as PartitionConfig or a held queue."""
    for job in ids:
        state = states.get(job)
        if state is not None and state.name == "PENDING" and state.reason not in USUAL:
            if (job, state.reason) not in said:
                print(f"SLURM: job {job} waits: {state.reason}", flush=True)
            said.add((job, state.reason))


def _end_of(one: _Submitted, states: dict[str, QueueState] | None) -> JobReturn | None:
    """The return of a job that has ended; None while it may still go on.

    A job that was preempted has saved and left a result which says so, and SLURM starts it again: only a result that
    is good is believed without asking the queue.
    """
    result = result_in(one.submitit.paths)
    if isinstance(result, JobReturn) and result.status is JobStatus.COMPLETED:
        return result
    if states is None:
        return None
    state = states.get(one.submitit.job_id)
    if state is not None and not state.ended:
        one.since = None
        return None
    now = time.monotonic()
    one.since = one.since or now
    patience = 0.0 if result is not None and state is not None else RESULT_S if state is not None else LOST_S
    if now - one.since < patience:
        return None
    if isinstance(result, JobReturn):
        return result
    said = "the queue no longer knows it" if state is None else f"SLURM: {state.name}"
    why = f" ({state.reason})" if state is not None and state.reason not in ("None", "") else ""
    log = str(one.submitit.paths.stderr)
    return failed(one.job.config, result or JobDied(f"job {one.submitit.job_id} left no result; {said}{why}", log))


def _cancel(open_jobs: Sequence[_Submitted]) -> None:
    """`scancel`, and wait until the jobs have saved; a second Ctrl-C does not wait."""
    ids = [one.submitit.job_id for one in open_jobs]
    print(f"cancelling {', '.join(ids)}", file=sys.stderr, flush=True)
    cancel(ids)
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        states = queue_states()
        if states is not None and all(job not in states or states[job].ended for job in ids):
            return
        time.sleep(LOOK_S)
