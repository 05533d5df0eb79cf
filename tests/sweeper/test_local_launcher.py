"""`hydra/launcher=local`: jobs in processes of their own, each in a place with GPUs and CPU threads of its own.

The jobs here are plain Hydra jobs. What they do stands in functions within the tests, which are carried to the other
processes by value, so that these need not import this file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import submitit
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from sweeper.launchers import gpus as gpus_module
from sweeper.launchers import local
from sweeper.launchers.local import LocalLauncher
from tuner.config import available_cpus
from tuner.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hydra_restore_singletons")]

Task = Callable[[DictConfig], Any]
QUIET = "defaults:\n- override hydra/hydra_logging: none\n- override hydra/job_logging: none\n- _self_\njob: null\n"


def launch(launcher: LocalLauncher, folder: Path, task: Task, jobs: Sequence[str]) -> Sequence[JobReturn]:
    """Run `task` once with each of `jobs` as the key `job`; the sweep folder is `folder/sweep`."""
    (folder / "config.yaml").write_text(QUIET)
    with initialize_config_dir(config_dir=str(folder), version_base="1.3", job_name="jobs"):
        loader = GlobalHydra.instance().config_loader()
        sweep = [f"hydra.sweep.dir={folder}/sweep", "hydra.output_subdir=null"]
        config = loader.load_configuration("config", sweep, RunMode.MULTIRUN)
        launcher.setup(hydra_context=HydraContext(loader, Callbacks()), task_function=task, config=config)
        return launcher.launch([[f"job={job}"] for job in jobs], 0)


def said(result: JobReturn) -> str:
    """The error of a failed job and all that is noted on it."""
    assert result.status is JobStatus.FAILED
    assert isinstance(result._return_value, Exception)
    return "\n".join([str(result._return_value), *getattr(result._return_value, "__notes__", [])])


def log_of(result: JobReturn) -> Path:
    """The log that the error of a failed job names."""
    (line,) = (line for line in said(result).splitlines() if line.startswith("log "))
    return Path(line.removeprefix("log "))


# ---- places ----


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "available_cpus", lambda: 8)


PLACES = [
    # CUDA_VISIBLE_DEVICES, gpus, max_parallel -> places, CPU threads of each
    ("0,1,2,3", None, None, [["0"], ["1"], ["2"], ["3"]], 2),
    ("0,1,2,3", 1, None, [["0"], ["1"], ["2"], ["3"]], 2),
    ("0,1,2,3", 1, 2, [["0"], ["1"]], 4),
    ("0,1,2,3", 2, None, [["0", "1"], ["2", "3"]], 4),
    ("0,1,2,3", 2, 1, [["0", "1"]], 8),
    ("0,1,2,3", 3, None, [["0", "1", "2"]], 8),
    ("0,1,2,3", 4, None, [["0", "1", "2", "3"]], 8),
    ("0,1,2,3", 0, None, [[], [], [], []], 2),
    ("0,1,2,3", 0, 3, [[], [], []], 2),
    (" 5 , 7,", None, None, [["5"], ["7"]], 4),
    ("GPU-1a,GPU-2b,MIG-3c", None, None, [["GPU-1a"], ["GPU-2b"], ["MIG-3c"]], 2),
    ("GPU-1a,GPU-2b,MIG-3c", 2, None, [["GPU-1a", "GPU-2b"]], 8),
    ("", None, None, [[], [], [], []], 2),
    ("", 0, 16, [[]] * 16, 1),
    ("", None, 1, [[]], 8),
]


@pytest.mark.parametrize(("visible", "gpus", "max_parallel", "places", "cpus"), PLACES)
def test_places(
    visible: str,
    gpus: int | None,
    max_parallel: int | None,
    places: list[list[str]],
    cpus: int,
    eight_cpus: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    launcher = LocalLauncher(max_parallel, gpus, None)
    assert launcher.places == places
    assert launcher.cpus_of_each == cpus


@pytest.mark.parametrize(("visible", "gpus"), [("-1", []), ("NoDevFiles", []), ("0,-1,1", ["0"])])
def test_cuda_sees_no_device_from_an_invalid_entry_on(
    visible: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_module.visible_gpus() == gpus


ENOUGH = (
    "hydra.launcher.max_parallel={} hydra.launcher.gpus={}: this machine shows {} GPUs, enough for {} trials at once"
)


@pytest.mark.parametrize(
    ("visible", "gpus", "max_parallel", "sentence"),
    [
        ("0,1,2,3", 5, None, "hydra.launcher.gpus=5: this machine shows 4 GPUs"),
        ("", 1, None, "hydra.launcher.gpus=1: this machine shows 0 GPUs"),
        ("0,1,2,3", 2, 3, ENOUGH.format(3, 2, 4, 2)),
        ("GPU-1a", None, 2, ENOUGH.format(2, 1, 1, 1)),
    ],
)
def test_more_than_there_is_is_refused_in_one_line(
    visible: str, gpus: int | None, max_parallel: int | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError) as caught:
        LocalLauncher(max_parallel, gpus, None)
    assert caught.value.problems == [sentence]


def test_without_gpus_a_job_has_two_cpus_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert len(LocalLauncher(None, None, None).places) == max(1, available_cpus() // 2)


LISTED = """\
GPU 0: NVIDIA H100 (UUID: GPU-0aa)
  MIG 1g.10gb     Device  0: (UUID: MIG-1bb)
  MIG 1g.10gb     Device  1: (UUID: MIG-2cc)
GPU 1: NVIDIA H100 (UUID: GPU-3dd)
"""


@pytest.mark.parametrize(
    ("program", "found"),
    [
        (f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n", ["0", "1"]),
        ("#!/bin/sh\necho GPU 0: half a list\nexit 9\n", []),
        (None, []),
    ],
    ids=["two", "driver-away", "no-driver"],
)
def test_the_driver_is_asked_where_nothing_is_said(
    program: str | None, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if program else str(tmp_path))
    if program:
        (tmp_path / "nvidia-smi").write_text(program)
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert gpus_module.visible_gpus() == found


# ---- jobs in their places ----


def recorded(folder: Path, number: int) -> list[dict[str, Any]]:
    """What `number` jobs have seen, in the order they began."""
    rows = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    assert len(rows) == number
    return sorted(rows, key=lambda row: row["start"])


def recording(folder: Path) -> Task:
    """A job that writes down where and when it ran."""

    def record(config: DictConfig) -> int:
        start = time.time()
        time.sleep(0.3)
        row = {"start": start, "end": time.time(), "pid": os.getpid(), "environ": dict(os.environ)}
        (folder / f"{config.job}.json").write_text(json.dumps(row))
        return int(config.job) * 10

    return record


@pytest.mark.parametrize(
    ("visible", "gpus", "number", "sets"),
    [
        ("0,1,2,3", 1, 8, {"0", "1", "2", "3"}),
        ("0,1,2,3", 2, 3, {"0,1", "2,3"}),
        ("GPU-1a,GPU-2b", None, 3, {"GPU-1a", "GPU-2b"}),
    ],
)
def test_jobs_share_the_gpus_out_and_never_one_at_the_same_time(
    visible: str, gpus: int | None, number: int, sets: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    launcher = LocalLauncher(None, gpus, None)
    returns = launch(launcher, tmp_path, recording(tmp_path), [str(job) for job in range(number)])
    assert [result.return_value for result in returns] == [job * 10 for job in range(number)]
    rows = recorded(tmp_path, number)
    assert {row["environ"]["CUDA_VISIBLE_DEVICES"] for row in rows} == sets
    for index, row in enumerate(rows):
        for other in rows[:index]:
            if row["environ"]["CUDA_VISIBLE_DEVICES"] == other["environ"]["CUDA_VISIBLE_DEVICES"]:
                assert other["end"] <= row["start"]
    assert len({row["pid"] for row in rows} | {os.getpid()}) == number + 1
    assert {row["environ"]["OMP_NUM_THREADS"] for row in rows} == {str(launcher.cpus_of_each)}
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]) == (visible, "77")


def test_without_gpus_jobs_see_none_and_no_more_run_at_once_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("PYTHONPATH")
    returns = launch(LocalLauncher(2, 0, None), tmp_path, recording(tmp_path), ["0", "1", "2"])
    assert all(result.status is JobStatus.COMPLETED for result in returns)
    rows = recorded(tmp_path, 3)
    assert {row["environ"]["CUDA_VISIBLE_DEVICES"] for row in rows} == {""}
    for row in rows:
        assert sum(other["start"] <= row["start"] < other["end"] for other in rows) <= 2
    assert "PYTHONPATH" not in os.environ


# ---- jobs that fail ----


KINDS = ["slow", "fine", "raises", "killed", "not picklable", "not unpicklable", "exits", "own pickle", "last"]


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, JobReturn]:
    """The returns of one launch in which most jobs fail, each in its way, by what is wrong with them."""

    def task(config: DictConfig) -> str:
        kind = config.job
        print(f"this is {kind}", file=sys.stderr)
        if kind == "raises":
            raise ValueError(f"no good: {kind}")
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "not picklable":
            error = RuntimeError("holds a lock")
            error.lock = threading.Lock()  # type: ignore[attr-defined]
            raise error
        if kind == "not unpicklable":

            class TwoArguments(Exception):
                def __init__(self, one: int, two: int) -> None:
                    super().__init__(f"{one} and {two}")

            raise TwoArguments(1, 2)
        if kind == "exits":
            sys.exit("no more of this")
        if kind == "own pickle":
            json.loads("{")
        if kind == "slow":
            time.sleep(2)
        return f"done {kind}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        returns = launch(LocalLauncher(2, None, None), tmp_path_factory.mktemp("failing"), task, KINDS)
    return dict(zip(KINDS, returns, strict=True))


def test_returns_are_in_the_order_of_the_jobs_whichever_ended_first(failing: dict[str, JobReturn]) -> None:
    assert [result.overrides for result in failing.values()] == [[f"job={kind}"] for kind in KINDS]


@pytest.mark.parametrize("kind", ["slow", "fine", "last"])
def test_one_job_s_failure_costs_the_others_nothing(kind: str, failing: dict[str, JobReturn]) -> None:
    assert failing[kind].return_value == f"done {kind}"
    assert failing[kind].cfg is not None
    assert failing[kind].cfg.job == kind


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raises", "no good: raises"),
        ("killed", "killed"),
        ("not picklable", "RuntimeError: holds a lock"),
        ("not unpicklable", "1 and 2"),
        ("own pickle", "Expecting property name"),
        pytest.param("exits", "sys.exit('no more of this')"),
    ],
)
def test_a_failed_job_says_what_happened(kind: str, words: str, failing: dict[str, JobReturn]) -> None:
    assert words in said(failing[kind])
    with pytest.raises(type(failing[kind]._return_value)):
        failing[kind].return_value  # noqa: B018


def test_the_error_is_the_one_that_was_raised(failing: dict[str, JobReturn]) -> None:
    assert isinstance(failing["raises"]._return_value, ValueError)
    assert isinstance(failing["own pickle"]._return_value, json.JSONDecodeError)


@pytest.mark.parametrize(
    "kind",
    [
        "raises",
        "killed",
        "not picklable",
        "not unpicklable",
        "exits",
        pytest.param("own pickle"),
    ],
)
def test_a_failed_job_names_its_log(kind: str, failing: dict[str, JobReturn]) -> None:
    assert f"this is {kind}" in log_of(failing[kind]).read_text()


def test_the_log_holds_the_traceback(failing: dict[str, JobReturn]) -> None:
    assert "ValueError: no good: raises" in log_of(failing["raises"]).read_text()


def test_a_return_value_that_cannot_be_read_back_costs_the_others_nothing(tmp_path: Path) -> None:
    def task(config: DictConfig) -> Any:
        class Unreadable:
            def __reduce__(self) -> Any:
                return int, ("no number",)

        return Unreadable() if config.job == "bad" else "good"

    returns = launch(LocalLauncher(1, 0, None), tmp_path, task, ["bad", "other"])
    assert returns[1].return_value == "good"
    assert "no number" in said(returns[0])


def test_a_job_never_returns_what_a_former_one_left(tmp_path: Path) -> None:
    """Process numbers begin anew in every container; here in every call of unshare."""
    unshare = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("this machine gives no process numbers of its own (unshare)")
    script = tmp_path / "application.py"
    script.write_text(
        "import os, signal\n"
        "import hydra\n"
        "@hydra.main(version_base='1.3', config_path=None)\n"
        "def task(config):\n"
        "    if config.job == 'killed':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "task()\n"
    )
    words = [f"hydra.searchpath=[file://{local.__file__.rpartition('/sweeper/')[0]}/conf]", "hydra/launcher=local"]
    command = [*unshare, sys.executable, str(script), "-m", *words, "hydra.sweep.dir=sweep"]
    done = [
        subprocess.run([*command, f"+job={job}"], capture_output=True, text=True, check=False)
        for job in ("fine", "killed")
    ]
    assert done[0].returncode == 0, done[0].stderr
    assert done[1].returncode == 1, "the job was killed"
    assert "JobDied: killed" in done[1].stderr


# ---- jobs that are told to end ----


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def waiting_job(folder: Path, hears: bool) -> Task:
    """A job that goes on for a minute; one that hears SIGTERM saves and ends, one that does not ignores all it can."""

    def wait(config: DictConfig) -> None:
        def save(number: int, frame: Any) -> None:
            (folder / "saved").touch()
            raise KeyboardInterrupt("saved")

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, save if hears else signal.SIG_IGN)
        (folder / f"pid-{config.job}").write_text(str(os.getpid()))
        time.sleep(60)

    return wait


@pytest.fixture
def interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[LocalLauncher, Task, float], tuple[int, float]]]:
    """Launches three jobs one after another, presses Ctrl-C in the first; the process of that and the seconds taken."""
    first = tmp_path / "pid-0"

    def ctrl_c() -> None:
        until = time.monotonic() + 60
        while not (first.exists() and first.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    pressed: list[float] = []

    def run(launcher: LocalLauncher, task: Task, patience_s: float) -> tuple[int, float]:
        monkeypatch.setattr(local, "PATIENCE_S", patience_s)
        thread = threading.Thread(target=ctrl_c)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            launch(launcher, tmp_path, task, ["0", "1", "2"])
        seconds = time.monotonic() - pressed[0]
        thread.join()
        pid = int(first.read_text())
        for _ in range(200):  # submitit's controller takes a second to kill
            if not alive(pid):
                break
            time.sleep(0.05)
        return pid, seconds

    yield run
    if alive(pid := int(first.read_text())):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("visible", ["0", "GPU-1a"])
def test_ctrl_c_lets_jobs_save_and_starts_no_other(
    visible: str,
    interrupted: Callable[[LocalLauncher, Task, float], tuple[int, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    pid, seconds = interrupted(LocalLauncher(1, None, None), waiting_job(tmp_path, hears=True), 30.0)
    assert (tmp_path / "saved").exists()
    assert not alive(pid)
    assert seconds < 20.0, "it does not wait for longer than the job takes"
    assert sorted(file.name for file in tmp_path.glob("pid-*")) == ["pid-0"]


def test_a_job_that_does_not_listen_is_killed_after_a_while(
    interrupted: Callable[[LocalLauncher, Task, float], tuple[int, float]], tmp_path: Path
) -> None:
    pid, seconds = interrupted(LocalLauncher(1, 0, None), waiting_job(tmp_path, hears=False), 3.0)
    assert not alive(pid)
    assert 3.0 <= seconds < 20.0


def test_a_job_without_handlers_of_its_own_ends_at_ctrl_c(
    interrupted: Callable[[LocalLauncher, Task, float], tuple[int, float]], tmp_path: Path
) -> None:
    def wait(config: DictConfig) -> None:
        (tmp_path / f"pid-{config.job}").write_text(str(os.getpid()))
        time.sleep(60)

    pid, seconds = interrupted(LocalLauncher(1, 0, None), wait, 30.0)
    assert not alive(pid)
    assert seconds < 20.0


@pytest.fixture(scope="module")
def over_time(tmp_path_factory: pytest.TempPathFactory) -> dict[str, JobReturn]:
    """Three jobs with eight seconds each, of which two take longer; a job is told three seconds before its end.

    time_min is in minutes, but submitit counts in seconds.
    """

    class Executor(submitit.LocalExecutor):  # type: ignore[misc]
        def update_parameters(self, **given: Any) -> None:
            super().update_parameters(**given, signal_delay_s=3)

    def wait(config: DictConfig) -> str:
        if config.job == "short":
            return "done"
        if config.job == "deaf":
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        print(f"process {os.getpid()}", file=sys.stderr, flush=True)
        time.sleep(60)
        return "too late"

    kinds = ["told", "deaf", "short"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submitit, "LocalExecutor", Executor)
        launcher = LocalLauncher(2, 0, 1)
        launcher.time_min = 8 / 60  # type: ignore[assignment]
        returns = launch(launcher, tmp_path_factory.mktemp("over_time"), wait, kinds)
    return dict(zip(kinds, returns, strict=True))


def test_a_job_over_its_time_ends_and_the_others_go_on(over_time: dict[str, JobReturn]) -> None:
    assert "timed-out" in said(over_time["told"])
    assert "killed" in said(over_time["deaf"])
    for kind in ("told", "deaf"):
        (pid,) = re.findall(r"^process (\d+)$", log_of(over_time[kind]).read_text(), re.MULTILINE)
        assert not alive(int(pid))
    assert over_time["short"].return_value == "done"


def test_a_job_that_was_killed_at_its_time_limit_says_so(over_time: dict[str, JobReturn]) -> None:
    assert "hydra.launcher.time_min" in said(over_time["deaf"])
