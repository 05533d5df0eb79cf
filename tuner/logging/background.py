"""A logger whose backend works in a thread of its own, behind the training steps.

Training hands over a row and goes on; the thread opens the backend (which may import a large library or wait for a
network), sends rows in batches and tries again after a failure. Nothing is lost meanwhile: rows wait in memory, and the
run folder holds everything. The thread is a daemon and `close` waits a stated time, so a backend that hangs cannot
keep a finished run from ending.
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tuner.logging.disk import Row
from tuner.types import RunInfo

_LONGEST_PAUSE_S = 60.0
"""Between two attempts at a backend that is away, at most."""


@dataclass(frozen=True)
class _End:
    status: str
    summary: Mapping[str, Any]


class BackgroundLogger(ABC):
    """A `Logger` over the five methods below, which only the thread calls and which may block and raise.

    Args:
        flush_every_s: how long rows are gathered before they are sent.
        close_timeout_s: how long `close` waits for what is still to be sent.
    """

    backend: ClassVar[str]
    remedy: ClassVar[str]
    """What the person can do about a backend that was away; `{out}` is the run folder."""

    def __init__(self, flush_every_s: float, close_timeout_s: float) -> None:
        self._flush_every_s = flush_every_s
        self._close_timeout_s = close_timeout_s
        self._queue: queue.SimpleQueue[Row | Path | _End] = queue.SimpleQueue()
        self._rows: list[Row] = []
        self._artifacts: list[Path] = []
        self._facts: dict[str, Any] = {}
        self._problem: Exception | None = None
        self._warned = False
        self._delivered = False
        self._thread: threading.Thread | None = None

    @abstractmethod
    def open(self, run: RunInfo) -> dict[str, Any]:
        """Reach the backend and tell it what is known before the first step; returns facts for the summary.

        Called again after a failure, so it must not do twice what it did once.
        """

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Send rows, in order."""

    @abstractmethod
    def keep(self, path: Path) -> None:
        """Copy a file or folder of the run folder."""

    @abstractmethod
    def finish(self, status: str, summary: Mapping[str, Any], complete: bool) -> None:
        """End the run; `complete` says whether all rows and artifacts have arrived."""

    def reason(self, problem: Exception) -> str:
        """One line that says what is wrong with the backend."""
        return root_cause(problem)

    def quiet(self) -> AbstractContextManager[None]:
        """What the thread works in: keeps the backend's own messages off the terminal."""
        return nullcontext()

    def start(self, run: RunInfo) -> None:
        """Start the thread; returns at once."""
        self._out = run.out
        self._thread = threading.Thread(target=self._work, args=(run,), name=f"{self.backend} logger", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over a row; returns at once."""
        self._started()
        self._queue.put(Row(step, time.time(), dict(metrics)))
        self._warn_once()

    def artifact(self, path: Path) -> None:
        """Hand over a path; what it holds is read later, so it should stay as it is."""
        self._started()
        self._queue.put(path)

    def close(self, status: str, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Wait, at most `close_timeout_s`, until all is sent; returns the facts that `open` found."""
        thread = self._started()
        self._queue.put(_End(status, dict(summary)))
        thread.join(self._close_timeout_s)
        if not self._delivered and self._problem is None:
            self._problem = TimeoutError(f"no answer within {self._close_timeout_s:g} s of the end of the run")
        self._warn_once()
        return dict(self._facts)

    def _started(self) -> threading.Thread:
        if self._thread is None:
            raise RuntimeError(f"{type(self).__name__}: start comes before log, artifact and close")
        return self._thread

    def _warn_once(self) -> None:
        """In the caller's thread, where filters and handlers of warnings are those of the caller."""
        if self._problem is not None and not self._warned:
            self._warned = True
            remedy = self.remedy.format(out=self._out)
            warnings.warn(f"{self.backend}: {self.reason(self._problem)}; {remedy}", RuntimeWarning, stacklevel=3)

    def _work(self, run: RunInfo) -> None:
        """The thread."""
        try:
            with self.quiet():
                self._serve(run)
        except Exception as problem:  # said by `log` or `close`
            self._problem = problem

    def _serve(self, run: RunInfo) -> None:
        """Gather, send, and after a failure wait longer each time, until the end of the run."""
        pause_s, opened, end = 0.0, False, None
        while end is None:
            end = self._gather(pause_s)
            try:
                if not opened:
                    self._facts.update(self.open(run))
                    opened = True
                self._send()
                self._problem = None  # what has healed before it was said need not be said
                pause_s = self._flush_every_s
            except Exception as problem:
                self._problem = problem
                pause_s = min(max(2 * pause_s, 1.0), _LONGEST_PAUSE_S)
        if opened:
            complete = not self._rows and not self._artifacts
            self.finish(end.status, end.summary, complete)  # the true status arrives even where an artifact did not
            self._delivered = complete

    def _gather(self, pause_s: float) -> _End | None:
        """Take what comes within `pause_s`; returns early at the end of the run."""
        until = time.monotonic() + pause_s
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return None
            if isinstance(item, _End):
                return item
            if isinstance(item, Row):
                self._rows.append(item)
            else:
                self._artifacts.append(item)

    def _send(self) -> None:
        if self._rows:
            self.write(self._rows)
            self._rows = []
        while self._artifacts:
            self.keep(self._artifacts[0])
            self._artifacts.pop(0)


def root_cause(problem: Exception) -> str:
    """The innermost cause says what happened; the layers above it say where in the library."""
    cause: BaseException = problem
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0][:300]}" if lines else type(cause).__name__
