"""What is seen of a sweep while its trials run: a line as each one ends, and MLflow kept up with their folders."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeper.plan import Trial
from sweeper.tracking import Tracking
from sweeper.trial import summary_of

LOOK_S = 0.5
PUBLISH_S = 20.0
"""How often the folder of a trial that goes on is brought into MLflow."""


class Watch:
    """A thread that looks at the run folders, whatever runs the trials; a context manager.

    Args:
        trials: those that are run now, with their folders.
        tracking: gets each folder as it grows and when it is whole.
        say: prints a line.
    """

    def __init__(self, trials: Sequence[tuple[Trial, Path]], tracking: Tracking, say: Callable[[str], None]) -> None:
        self._open = dict.fromkeys(range(len(trials)))
        self._trials = trials
        self._tracking = tracking
        self._say = say
        self._problem: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sweep watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Wait until the folders of all that ended are published."""
        self._end.set()
        self._thread.join()
        self._look(publish_all=True, last=True)
        if self._problem is not None:
            self._say(f"warning: MLflow: {self._problem}")

    def _work(self) -> None:
        waited_s = 0.0
        while not self._end.wait(LOOK_S):
            waited_s += LOOK_S
            publish = waited_s >= PUBLISH_S
            waited_s = 0.0 if publish else waited_s
            self._look(publish)

    def _look(self, publish_all: bool, last: bool = False) -> None:
        for index in list(self._open):
            trial, out = self._trials[index]
            summary = summary_of(out)
            # One that was preempted has stopped too, and goes on later.
            ended = summary is not None and (last or summary["status"] != "stopped")
            if summary is not None and ended:
                del self._open[index]
                self._say(self._line(trial, summary))
            if ended or publish_all:
                self._problem = self._tracking.publish(out) or self._problem

    def _line(self, trial: Trial, summary: Mapping[str, Any]) -> str:
        number = f"[{len(self._trials) - len(self._open)}/{len(self._trials)}]"
        objective = "" if summary["objective"] is None else f"objective {float(summary['objective']):.4g}"
        return "  ".join([number, trial.id, summary["status"], objective, f"{summary['seconds']:.1f} s", trial.name])
