"""Signals to a run: the first is a wish, a scheduler's repetitions are nothing, whenever they come."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

STOPPED_AND_SIGNALLED = """
import os, signal, sys
from tuner.interruption import stop_on_signals
inside, after = ([signal.Signals[name] for name in words.split()] for words in sys.argv[1:])
with stop_on_signals() as stop:
    for number in inside:
        os.kill(os.getpid(), number)
for number in after:
    os.kill(os.getpid(), number)
print(stop.reason, end="")
"""


def signalled(inside: Sequence[str], after: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STOPPED_AND_SIGNALLED, " ".join(inside), " ".join(after)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("inside", "after"),
    [
        (["SIGTERM", "SIGTERM"], ["SIGTERM"]),
        (["SIGTERM"], ["SIGTERM", "SIGUSR2"]),
        (["SIGUSR2", "SIGTERM"], ["SIGUSR2", "SIGTERM"]),
        (["SIGINT"], []),
    ],
)
def test_the_first_is_the_reason_and_a_schedulers_repetition_is_not_heard(
    inside: Sequence[str], after: Sequence[str]
) -> None:
    done = signalled(inside, after)
    assert (done.returncode, done.stdout) == (0, inside[0])
    assert done.stderr == "\nstopping: the step is finished and saved first; a second Ctrl-C stops at once\n"


@pytest.mark.parametrize(("inside", "after"), [([], "SIGTERM"), ([], "SIGUSR2"), (["SIGINT"], "SIGTERM")])
def test_what_nobody_repeats_ends_the_process_after_the_run(inside: Sequence[str], after: str) -> None:
    assert signalled(inside, [after]).returncode == -signal.Signals[after]


def test_ctrl_c_is_ctrl_c_before_during_and_after() -> None:
    assert "KeyboardInterrupt" in signalled(["SIGINT", "SIGINT"], []).stderr
    assert "KeyboardInterrupt" in signalled(["SIGTERM"], ["SIGINT"]).stderr
