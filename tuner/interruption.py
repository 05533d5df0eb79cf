"""Ctrl-C and a scheduler's signals as a wish that the loop grants between two steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Whether somebody asked the run to stop; `reason` is the signal's name."""

    def __init__(self) -> None:
        self.reason: str | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """The first signal is remembered, so that the step is finished and saved; a second Ctrl-C stops at once.

    Schedulers repeat themselves: SLURM sends SIGTERM twice at a time limit. One that insists has SIGKILL, so what it
    sends after the first stays unheard, also after this context: the repetition may come when the run has ended and the
    process has not. Signals can only be caught in the main thread; elsewhere nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if request.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if request.reason is not None:
            return
        request.reason = signal.Signals(number).name
        # Not print: a handler may run in the middle of one.
        os.write(2, b"\nstopping: the step is finished and saved first; a second Ctrl-C stops at once\n")

    before: dict[int, Any] = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield request
    finally:
        by_scheduler = request.reason not in (None, signal.SIGINT.name)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if by_scheduler and number != signal.SIGINT else handler)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """A scheduler's signals interrupt, as Ctrl-C does, what has no state yet that could be saved.

    One that repeats itself stays unheard, also after this context, so that the end can be told. Signals that somebody
    handles already are left to him.

    Raises:
        KeyboardInterrupt: with the signal's name.
    """
    heard: list[int] = []
    ours: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        for one in ours:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        ours += [one for one in SIGNALS if signal.getsignal(one) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        if not heard:
            for number in ours:
                signal.signal(number, signal.SIG_DFL)
