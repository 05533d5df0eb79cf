"""A run folder has one process at a time, and never stays locked behind one that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tuner
from tuner.checkpoint.lock import only_run_in
from tuner.errors import CheckpointError, ConfigError

HOLDS = """
import multiprocessing, os, subprocess, sys, time
from pathlib import Path
from tuner.checkpoint.lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    forked = os.fork()
    if forked == 0:
        time.sleep(60)
        os._exit(0)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    print(child.pid, forked, worker.pid, flush=True)
    time.sleep(60)
"""

LEAVES = """
import os, sys
from pathlib import Path
from tuner.checkpoint.lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    forked = os.fork()
    if forked == 0:
        raise SystemExit(0)
    print(os.waitpid(forked, 0)[1], flush=True)
    sys.stdin.read()
"""


def refused(out: Path) -> str:
    with pytest.raises(CheckpointError) as caught, only_run_in(out):
        pass
    return str(caught.value)


def holds(pid: int, file: Path) -> bool:
    """Whether a process has `file` open."""
    return any(entry.resolve() == file for entry in Path(f"/proc/{pid}/fd").iterdir())


def test_a_second_one_is_refused_in_one_line_until_the_first_ends(tmp_path: Path) -> None:
    out = tmp_path / "a" / "run"
    with only_run_in(out):
        assert refused(out) == f"{out}: another process is at work on this run; wait for its end, or give another out"
        with only_run_in(tmp_path / "other"):
            (out / "config.yaml").write_text("")
        assert refused(out), "being refused does not let the folder go"
    with only_run_in(out):
        pass
    assert [path.name for path in out.iterdir()] == ["config.yaml"], "no file of the lock stays"


def test_a_folder_into_which_nothing_was_written_goes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), only_run_in(tmp_path / "a" / "run"):
        raise ConfigError("wrong")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert refused(out) == f"{out}: cannot be made a run folder: Not a directory"


def test_a_kill_lets_the_folder_go_though_children_live_on(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(tuner.__file__).parents[1])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    children = [int(pid) for pid in holder.stdout.readline().split()]
    try:
        assert len(children) == 3
        assert "another process is at work" in refused(tmp_path)
        # a child lets go as it begins (at exec, or after the fork), a moment after its parent knows its pid
        deadline = time.monotonic() + 10
        while any(holds(child, tmp_path / ".lock") for child in children):
            assert time.monotonic() < deadline, "a child has the file"
            time.sleep(0.01)
        holder.kill()
        holder.wait()
        for child in children:
            os.kill(child, 0)  # it is there
        deadline = time.monotonic() + 5
        while True:
            try:
                with only_run_in(tmp_path):
                    return
            except CheckpointError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        holder.kill()
        holder.stdout.close()


def test_a_forked_child_that_leaves_the_block_lets_nothing_go(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(tuner.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", LEAVES, str(tmp_path)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "0\n"
        assert "another process is at work" in refused(tmp_path)
    assert holder.returncode == 0
    with only_run_in(tmp_path):
        pass


def test_many_that_take_turns_are_never_two_at_once(tmp_path: Path) -> None:
    """The file is taken away while it is held: whoever opened it before and locks it after must not think it has it."""
    inside: list[int] = []
    entered: list[int] = []

    def work(number: int) -> None:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            try:
                with only_run_in(tmp_path):
                    inside.append(number)
                    assert inside == [number]
                    entered.append(number)
                    inside.clear()
            except CheckpointError:
                continue

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, number) for number in range(4)]:
            done.result()
    assert len(set(entered)) == 4
    assert not inside
