"""Work done behind the training steps, one piece at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Behind:
    """A thread for one piece of work, whose error comes back to whoever asks next.

    It is no daemon: a process that ends while a checkpoint is written finishes writing it.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Begin; the piece before must have been asked for."""
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def wait(self) -> Exception | None:
        """The error of what was begun last, once it has ended; None if it went well or nothing was begun."""
        if self._thread is not None:
            self._thread.join()
        return self.ended()

    def ended(self) -> Exception | None:
        """Its error if it has ended by now, told once."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread, error, self._error = None, self._error, None
        return error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._error = error
