"""`heartbeat.json` of a run folder: which process is at work in it, kept fresh until the run ends.

A process that is killed cannot say so. What it leaves is this file: whoever finds it asks the operating system whether
that very process is still there or, on another machine, how old the file is. Nothing of it is a lock, so that looking
never keeps a run from starting.

The file's time is its modification time, which the file system gives: on a shared one it is the server's clock,
whatever the clocks of the machines say. It is overwritten in place, always at the same length: a reader never finds
half of it, opening it asks a network file system for the newest one, and a disk that is full has room for it still.
Where it has none for `summary.json`, this file stays and says how the run ended.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from tuner.logging.disk import ENVIRONMENT, SUMMARY
from tuner.logging.process import machine_id, process_start
from tuner.types import Summary

HEARTBEAT = "heartbeat.json"
BEAT_S = 10.0
STALE_S = 60.0
"""Without a beat for so long, a process of another machine is taken for gone: six beats, or a cached file's age."""

_ROOM = 3200
"""Bytes that may come to those of the first beat: longer step numbers, and why the run ended. All is one block."""

_REASON = 500
"""Characters of the reason, each of which JSON may spell in six."""

_PATIENCE_S = 5.0
"""How long a run waits for its first and last beat where the file system does not answer."""


@dataclass(frozen=True)
class Beat:
    """What stands in `heartbeat.json`.

    Attributes:
        host: the name of the machine, for people.
        machine: where the number of a process means something, as `machine_id` says it.
        pid: of the process.
        process_start: as `process_start` says it.
        began_s: when the run of this process began, by the clock of the file system, in seconds since the epoch.
        step, total_steps: how far it was at the last beat; None before the total is known.
        resume: the command that goes on with the run.
        reason: why it ended, where that could not be said elsewhere.
    """

    host: str
    machine: str
    pid: int
    process_start: str
    began_s: float | None
    step: int
    total_steps: int | None
    resume: str | None
    reason: str | None

    def alive(self, age_s: Callable[[], float]) -> bool:
        """Whether the process is there.

        Args:
            age_s: how old the file is by its file system's clock; asked only where the process cannot be.
        """
        if self.reason is not None:
            return False
        if self.machine == machine_id():
            found = process_start(self.pid)
            if found != "hidden":
                return found == self.process_start
        return age_s() < STALE_S


class Heartbeat:
    """Keeps `heartbeat.json` of `out` fresh while its block lasts, and takes it away at the end; a context manager.

    A thread does it, which no child inherits. It costs training nothing and never stops it: a beat that cannot be
    written is said once on stderr.

    Args:
        out: the run folder, which is there.
        summary: of the run; its steps and its command to resume are told.
    """

    def __init__(self, out: Path, summary: Summary) -> None:
        self._file = out / HEARTBEAT
        self._summary = summary
        self._began_s: float | None = None
        self._length = 0
        self._said = False
        self._reason: str | None = None
        self._first, self._end = threading.Event(), threading.Event()
        self._owner = os.getpid()
        self._process_start = str(process_start(self._owner))
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        self._first.wait(_PATIENCE_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() == self._owner:
            self._end.set()
            self._thread.join(_PATIENCE_S)

    def _work(self) -> None:
        self._trying(self._beat)
        self._first.set()
        while not self._end.wait(BEAT_S):
            self._trying(self._beat)
        self._trying(self._finish)

    def _trying(self, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as problem:
            if not self._said:
                self._said = True
                said = f"warning: {self._file}: {problem.strerror}; the run goes on, and `tuner ls runs` may not see it"
                print(said, file=sys.stderr, flush=True)

    def _beat(self) -> None:
        if self._began_s is None:
            self._begin()
        descriptor = os.open(self._file, os.O_WRONLY)  # closed again at once: no child has it
        try:
            os.pwrite(descriptor, self._text(), 0)
        finally:
            os.close(descriptor)

    def _finish(self) -> None:
        out = self._file.parent
        if (out / ENVIRONMENT).exists() and not (out / SUMMARY).exists() and self._began_s is not None:
            self._reason = (self._summary.reason or "it has left no summary")[:_REASON]
            self._beat()
        else:
            self._file.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Put the file in the place of one that a killed process has left, whole from the first moment."""
        unfinished = self._file.with_name(f".{HEARTBEAT}.unfinished")
        self._length = len(self._text()) + _ROOM
        try:
            unfinished.write_bytes(self._text())
            unfinished.replace(self._file)
        finally:
            unfinished.unlink(missing_ok=True)
        self._began_s = self._file.stat().st_mtime

    def _text(self) -> bytes:
        beat = Beat(
            platform.node(),
            machine_id(),
            self._owner,
            self._process_start,
            self._began_s,
            self._summary.steps,
            self._summary.total_steps,
            self._summary.resume,
            self._reason,
        )
        return json.dumps(asdict(beat)).encode().ljust(self._length - 1) + b"\n"


def read_beat(out: Path) -> tuple[Beat, float] | None:
    """What `heartbeat.json` says and its modification time; None where there is none."""
    try:
        with (out / HEARTBEAT).open("rb") as file:
            return Beat(**json.load(file)), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
