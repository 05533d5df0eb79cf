"""`hydra/launcher=local`: jobs in processes of their own on this machine, so many at once.

submitit's executor starts everything at once and gives every job the first GPUs; here a job waits for a place, and a
place has GPUs of its own and its share of the CPU threads.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, configure_log
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from sweeper.errors import JobDied
from sweeper.launchers.gpus import sets_of, visible_gpus
from sweeper.launchers.jobs import Job, environment, failed, import_path, job_folder, jobs_of, result_in
from tuner.config import available_cpus
from tuner.errors import ConfigError
from tuner.types import NonNegativeInt, PositiveInt

LOOK_S = 0.05
YEARS_MIN = 10 * 365 * 24 * 60
"""submitit's executor wants a limit."""
PATIENCE_S = 60.0
"""How long jobs that are told to stop may take for it."""


@dataclass
class _Running:
    index: int
    submitted: Any
    place: list[str]
    started: float


class LocalLauncher(Launcher):
    """Jobs through submitit's local executor.

    Args:
        max_parallel: jobs at once; None for as many as there are sets of GPUs, without GPUs one per two CPUs.
        gpus: of each job; None for one if the machine has any.
        time_min: longest time of a job in minutes; it gets SIGUSR2 half a minute before.

    Raises:
        ConfigError: more GPUs are asked for than the machine has.
    """

    def __init__(
        self, max_parallel: PositiveInt | None, gpus: NonNegativeInt | None, time_min: PositiveInt | None
    ) -> None:
        available = visible_gpus()
        size = min(1, len(available)) if gpus is None else gpus
        places = sets_of(available, size)
        if size and not places:
            raise ConfigError(f"hydra.launcher.gpus={size}: this machine shows {len(available)} GPUs")
        if size and max_parallel is not None and max_parallel > len(places):
            raise ConfigError(
                f"hydra.launcher.max_parallel={max_parallel} hydra.launcher.gpus={size}: this machine shows "
                f"{len(available)} GPUs, enough for {len(places)} trials at once"
            )
        number = max_parallel or len(places) or max(1, available_cpus() // 2)
        self.places = places[:number] if size else [[] for _ in range(number)]
        self.cpus_of_each = max(1, available_cpus() // number)
        self.time_min = time_min or YEARS_MIN

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all; one that fails or dies costs the others nothing.

        Raises:
            KeyboardInterrupt: after the running ones were told to stop and have ended.
        """
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = jobs_of(Job, self.context, self.task, self.config, job_overrides, initial_job_idx)
        folder = job_folder(self.config)
        waiting, places = deque(enumerate(jobs)), deque(self.places)
        running: list[_Running] = []
        returns: dict[int, JobReturn] = {}
        try:
            while waiting or running:
                while waiting and places:
                    index, job = waiting.popleft()
                    place = places.popleft()
                    running.append(_Running(index, self._start(job, folder, place), place, time.monotonic()))
                for ended in [one for one in running if one.submitted.done()]:
                    running.remove(ended)
                    places.append(ended.place)
                    returns[ended.index] = self._returned(jobs[ended.index], ended)
                time.sleep(LOOK_S)
        except KeyboardInterrupt:
            _stop(running)
            raise
        return [returns[index] for index in range(len(jobs))]

    def _start(self, job: Job, folder: Path, place: list[str]) -> Any:
        from submitit import LocalExecutor

        executor = LocalExecutor(folder)
        executor.update_parameters(timeout_min=self.time_min)
        threads = str(self.cpus_of_each)
        # Not submitit's visible_gpus, which takes no names as GPU-8932f937 and MIG-...
        placed = replace(job, variables={"CUDA_VISIBLE_DEVICES": ",".join(place)})
        with environment(OMP_NUM_THREADS=threads, PYTHONPATH=import_path()), _ctrl_c_is_ours():
            return executor.submit(placed)

    def _returned(self, job: Job, ended: _Running) -> JobReturn:
        result = result_in(ended.submitted.paths)
        if isinstance(result, JobReturn):
            return result
        late = time.monotonic() - ended.started >= 60 * self.time_min
        why = f" at hydra.launcher.time_min={self.time_min:g}" if late else ""
        died = JobDied(f"killed{why}, it left no result", str(ended.submitted.paths.stderr))
        return failed(job.config, result or died)


@contextmanager
def _ctrl_c_is_ours() -> Iterator[None]:
    """Processes started here never get the terminal's Ctrl-C: submitit's would kill their jobs a second later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(running: Sequence[_Running]) -> None:
    """Tell the jobs to finish their step and save, and wait for that; a second Ctrl-C does not wait."""
    try:
        for one in running:
            one.submitted._process.send_signal(signal.SIGTERM)  # its controller hands it on
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and not all(one.submitted.done() for one in running):
            time.sleep(LOOK_S)
    finally:
        for one in running:
            if not one.submitted.done():
                _kill(one.submitted._process.pid)


def _kill(controller: int) -> None:
    """Kill what submitit's controller runs, on which it ends by itself."""
    import psutil

    for process in psutil.Process(controller).children(recursive=True):
        process.kill()
