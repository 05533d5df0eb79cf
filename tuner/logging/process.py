"""Which process of which machine, told apart from every other one of the same number."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path


def machine_id() -> str:
    """Where a process's number means something: this start of this machine and, in a container, its own numbers.

    Linux has an id for each; elsewhere it is the machine's name.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}" if boot.exists() else platform.node()


def process_start(pid: int) -> str | None:
    """When a process was started, which tells it from a later one of the same number; None where it is gone.

    On Linux in clock ticks since the machine started (proc(5), field 22), which no change of the clock moves; elsewhere
    in seconds since the epoch. `hidden` for a process that another user may not look at.
    """
    if not sys.platform.startswith("linux"):
        return _process_start_elsewhere(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "hidden" if _is_hidden(pid) else None
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended and waits for its parent to ask


def _is_hidden(pid: int) -> bool:
    """Whether a process is there though /proc does not show it (the mount option hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _process_start_elsewhere(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return "hidden"
