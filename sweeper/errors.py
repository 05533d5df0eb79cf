"""How a sweep ends when not everything went well."""

from __future__ import annotations

from tuner.errors import TunerError


class SweepIncomplete(TunerError):
    """Some of the points that were asked for did not finish; the others are kept and compared."""

    exit_code = 1


class SubmissionRefused(TunerError):
    """The scheduler took none of the trials; the message is its own."""


LOG_NOTE = "log "
"""How a launcher's note on the error of a job begins that names the file which holds what the job printed."""


class JobDied(Exception):
    """A job that ended without a result: killed, cancelled or out of time.

    Args:
        reason: what is known of its end.
        log: the file that holds what it printed, where there is one.
    """

    def __init__(self, reason: str, log: str | None = None) -> None:
        super().__init__(reason, log)
        self.reason = reason
        self.log = log

    def __str__(self) -> str:
        return self.reason
