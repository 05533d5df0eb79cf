"""A Hydra job as submitit carries it: composed where it is submitted, run elsewhere, its end brought back."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from sweeper.errors import LOG_NOTE, JobDied

FOLDER = ".submitit"
"""Inside the sweep folder: what submitit pickles, and what jobs print."""


@dataclass(frozen=True)
class Job:
    """What runs in the other process; an edit to a YAML after this was made changes nothing in it.

    Attributes:
        context, task: of the launcher.
        config: composed.
        singletons: Hydra's global state, custom resolvers among it.
        variables: set in the job's process before anything of the task is imported.
    """

    context: HydraContext
    task: TaskFunction
    config: DictConfig
    singletons: dict[Any, Any]
    variables: dict[str, str]

    def __call__(self) -> JobReturn:
        """Run it; an error is part of what is returned, made such that it can be pickled."""
        os.environ.update(self.variables)
        signal.signal(signal.SIGTERM, _interrupt)  # submitit ignores it; a task may have a handler of its own
        setup_globals()
        Singleton.set_state(self.singletons)
        try:
            result = run_job(
                task_function=self.task,
                config=self.config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
                hydra_context=self.context,
            )
        except KeyboardInterrupt as stopped:
            result = self.interrupted(stopped)
        except SystemExit as left:
            result = failed(self.config, JobDied(f"sys.exit({left.code!r})"))
        if result.status is JobStatus.FAILED:
            traceback.print_exception(result._return_value)  # the one that is pickled has none
            result._return_value = _picklable(result._return_value)
        return result

    def interrupted(self, stopped: KeyboardInterrupt) -> JobReturn:
        """What a job returns that was told to stop."""
        return failed(self.config, JobDied(str(stopped) or "interrupted"))


def jobs_of(
    kind: type[Job],
    context: HydraContext,
    task: TaskFunction,
    config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    first: int,
) -> list[Job]:
    """Every job with its configuration as it composes now."""
    setup_globals()
    jobs = []
    for index, overrides in enumerate(job_overrides, first):
        composed = context.config_loader.load_sweep_config(config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.id = f"job_{index}"
            composed.hydra.job.num = index
        jobs.append(kind(context, task, composed, Singleton.get_state(), {}))
    return jobs


def job_folder(config: DictConfig) -> Path:
    """Where submitit keeps its files for these jobs, a folder a job.

    New at each call: a process number comes again, and with it would come the result of a former job.
    """
    return Path(str(config.hydra.sweep.dir)).absolute() / FOLDER / f"{time.time_ns():x}" / "%j"


def result_in(paths: Any) -> JobReturn | JobDied | None:
    """What a submitit job left: its return, why there is none, or None where it left nothing.

    Args:
        paths: `submitit`'s JobPaths.
    """
    if not paths.result_pickle.exists():
        return None
    try:
        with paths.result_pickle.open("rb") as file:
            outcome, value = pickle.load(file)
    except Exception as error:  # whatever a task's own class raises when it is made again
        return JobDied(f"its result cannot be read: {type(error).__name__}: {error}", str(paths.stderr))
    if outcome == "success":
        assert isinstance(value, JobReturn)
        if value.status is JobStatus.FAILED:
            value._return_value.add_note(f"{LOG_NOTE}{paths.stderr}")
        return value
    return JobDied(str(value).strip().splitlines()[-1], str(paths.stderr))


def failed(config: DictConfig, error: JobDied) -> JobReturn:
    """The return of a job that could not make its own."""
    if error.log is not None:
        error.add_note(f"{LOG_NOTE}{error.log}")
    result = JobReturn()
    result.overrides = filter_overrides(OmegaConf.to_container(config.hydra.overrides.task))  # type: ignore[arg-type]
    result.status = JobStatus.FAILED
    result.return_value = error
    return result


def import_path() -> str:
    """What PYTHONPATH must hold for another process to import what this one runs: nothing, if it is installed."""
    root = str(Path(__file__).resolve().parents[2])
    given = os.environ.get("PYTHONPATH", "")
    installed = root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    return given if installed else os.pathsep.join([root, *filter(None, [given])])


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables while processes are started."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _picklable(error: Any) -> Exception:
    """The error itself if it survives being pickled, else its words."""
    import cloudpickle

    try:
        again = pickle.loads(cloudpickle.dumps(error))
        assert isinstance(again, Exception)
    except Exception:
        said = "".join(traceback.format_exception_only(error)).strip()
        print(f"not picklable, so only its words are brought back: {said}", file=sys.stderr)
        return RuntimeError(said)
    return error  # type: ignore[no-any-return]
