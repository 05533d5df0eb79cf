"""The file by which others see whether the process of a run is there: fresh while it is, telling when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import tuner
from tuner.logging import heartbeat
from tuner.logging.heartbeat import HEARTBEAT, Beat, Heartbeat, read_beat
from tuner.logging.process import machine_id, process_start
from tuner.types import Summary

PREAMBLE = """
import os, resource, sys, time
from pathlib import Path
from tuner.logging import heartbeat
from tuner.types import Summary
out = Path(sys.argv[1])
heartbeat.BEAT_S = 0.02
"""
HOLDS = """
with heartbeat.Heartbeat(out, Summary("failed", str(out), steps=3, total_steps=9, resume="again")):
    print("there", flush=True)
    time.sleep(60)
"""
FULL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # every write fails, as on a disk that is full
with heartbeat.Heartbeat(out, Summary("failed", str(out))):
    time.sleep(0.2)
print("done", os.listdir(out))
"""
FORKS = """
with heartbeat.Heartbeat(out, Summary("failed", str(out))):
    child = os.fork()
    if child == 0:
        raise SystemExit(0)
    os.waitpid(child, 0)
    print(os.listdir(out))
print(os.listdir(out))
"""


def python(code: str, out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(tuner.__file__).parents[1])}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, str(out)], env=environment, stdout=pipe, stderr=pipe, text=True
    )


def beat_of(out: Path) -> Beat:
    found = read_beat(out)
    assert found is not None
    return found[0]


def unasked() -> float:
    raise AssertionError("the process itself can be asked")


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_tells_where_the_run_is_and_is_gone_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)
    summary = Summary("failed", str(tmp_path), resume="python -m tuner seed=1")
    with Heartbeat(tmp_path, summary):
        first = beat_of(tmp_path)
        assert (first.pid, first.process_start, first.machine) == (
            os.getpid(),
            process_start(os.getpid()),
            machine_id(),
        )
        assert (first.step, first.total_steps, first.resume) == (0, None, "python -m tuner seed=1")
        assert first.alive(unasked)
        stat = (tmp_path / HEARTBEAT).stat()
        summary.steps, summary.total_steps = 123_456_789, 987_654_321
        until(lambda: beat_of(tmp_path).step == 123_456_789)
        now = (tmp_path / HEARTBEAT).stat()
        assert (now.st_ino, now.st_size) == (stat.st_ino, stat.st_size), "overwritten in place"
        assert now.st_mtime_ns > stat.st_mtime_ns
        assert beat_of(tmp_path) == replace(first, step=123_456_789, total_steps=987_654_321)
        assert first.began_s is not None
        assert first.began_s == pytest.approx(stat.st_mtime, abs=1.0)
    assert list(tmp_path.iterdir()) == []
    assert read_beat(tmp_path) is None


def test_a_reader_never_finds_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.0)
    summary = Summary("failed", str(tmp_path))
    with Heartbeat(tmp_path, summary):
        for number in range(2000):
            summary.steps = 10 ** (number % 10)
            assert json.loads((tmp_path / HEARTBEAT).read_text())["pid"] == os.getpid()


def test_a_killed_process_is_seen_at_once_and_whoever_gets_its_number_is_not_it(tmp_path: Path) -> None:
    process = python(HOLDS, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    beat = beat_of(tmp_path)
    assert (beat.pid, beat.step, beat.total_steps, beat.resume) == (process.pid, 3, 9, "again")
    assert beat.alive(unasked)
    assert not replace(beat, pid=os.getpid()).alive(unasked), "this process began at another time"
    process.send_signal(signal.SIGSTOP)
    assert beat.alive(unasked), "one that was stopped is there"
    process.kill()
    until(lambda: not beat.alive(unasked))  # though nobody has asked how it ended: it is a zombie
    process.communicate()
    assert not beat.alive(unasked)
    with Heartbeat(tmp_path, Summary("failed", str(tmp_path))):
        assert beat_of(tmp_path).pid == os.getpid(), "the next run takes its place"


@pytest.mark.parametrize(("age_s", "alive"), [(0.0, True), (59.0, True), (61.0, False)])
def test_of_another_machine_only_the_age_is_known(tmp_path: Path, age_s: float, alive: bool) -> None:
    with Heartbeat(tmp_path, Summary("failed", str(tmp_path))):
        elsewhere = replace(beat_of(tmp_path), machine="another")
        assert elsewhere.alive(lambda: age_s) is alive


def test_a_full_disk_is_said_once_and_stops_nothing(tmp_path: Path) -> None:
    out, err = python(FULL, tmp_path).communicate(timeout=60)
    assert out == "done []\n"
    assert err.splitlines() == [
        f"warning: {tmp_path / HEARTBEAT}: File too large; the run goes on, and `tuner ls runs` may not see it"
    ]


def test_it_stays_and_says_why_where_the_summary_could_not_be_written(tmp_path: Path) -> None:
    summary = Summary("failed", str(tmp_path))
    (tmp_path / "environment.json").write_text("{}")
    for reason, said in (
        ('no "room"', 'no "room"'),
        ("\u1e9e" * 5000, "\u1e9e" * 500),
        (None, "it has left no summary"),
    ):
        with Heartbeat(tmp_path, summary):
            summary.reason = reason
        beat = beat_of(tmp_path)
        assert beat.reason is not None
        assert beat.reason.startswith(said)
        assert not beat.alive(unasked), "though the process is there"
    (tmp_path / "summary.json").write_text("{}")
    with Heartbeat(tmp_path, summary):
        pass
    assert not (tmp_path / HEARTBEAT).exists()


def test_a_forked_child_takes_nothing_away(tmp_path: Path) -> None:
    out, err = python(FORKS, tmp_path).communicate(timeout=60)
    assert (out.splitlines(), err) == ([f"['{HEARTBEAT}']", "[]"], "")
