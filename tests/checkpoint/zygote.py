"""Commands in processes of their own that start at once: forks of one that has imported everything.

    python zygote.py   reads a line of JSON (the words) and answers with the process number of a fork that runs them;
                       its output goes to the file that the line names, and its training has no memory for a
                       batch of more than two rows with the sample `large`, where the line has that

Nothing has computed anything before the fork, so there is no thread that the fork would lack.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch
from hydra.core.global_hydra import GlobalHydra

import tuner.loop
import tuner.train
from tuner.__main__ import dispatch, reported


def fill(large: int) -> None:
    """Let memory run out after the first batch of a window where one has this sample and more than two rows."""
    add_gradients = tuner.loop.add_gradients

    def limited(model: Any, batches: Any, *more: Any, **words: Any) -> Any:
        if any(large in batch.sample_ids and batch.num_rows > 2 for batch in batches):
            add_gradients(model, batches[:1], *more, **words)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return add_gradients(model, batches, *more, **words)

    tuner.loop.add_gradients = limited


def child(words: list[str], log: str, large: int | None) -> None:
    for number in (0, 1, 2):
        os.dup2(os.open(log if number else os.devnull, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    GlobalHydra.instance().clear()
    if large is not None:
        fill(large)
    code = reported(lambda: dispatch(words), debug=True)
    sys.stdout.flush()
    os._exit(code)  # what a thread still does is lost, as with a kill: a run that has ended leaves nothing to it


def main() -> None:
    assert tuner.train
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(asked["words"], asked["log"], asked["large"])
        print(pid, flush=True)
        if sys.stdin.readline().strip() == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
