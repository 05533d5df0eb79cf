"""Chunks encoded in several processes, in the order they were given.

Rendering a conversation and masking its replies is Python and holds its lock, so threads gain nothing. The processes
are fresh ones that know only the encoder: a fork of a process in which torch or the tokenizer has started threads may
hang, and `multiprocessing`'s spawn runs the main module of whoever called this again. They talk in pickles through
their pipes, end when these are closed (so with the process that started them, whatever ends it), and leave Ctrl-C to
it.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tuner.data.encoding import Encoded, Encoder

if TYPE_CHECKING:
    from tuner.data.dataset import Example

Chunk = Sequence["Example"]

WORTH_PROCESSES = 20_000
"""Examples below which starting processes takes longer than what they save."""

MOST_PROCESSES = 8
"""More than this one can feed: reading a row and sending it takes an eighth of encoding it."""


def number_of_processes(workers: int | None, num_examples: int) -> int:
    """How many processes encode: as many as asked for, or one for each core where it pays; 1 is this one alone."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES) if num_examples >= WORTH_PROCESSES else 1


def encoded_chunks(encoder: Encoder, chunks: Iterable[Chunk], workers: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Each chunk with what it was encoded to, in order; not many more chunks are read than have been handed out.

    Args:
        encoder: what is done with one.
        chunks: examples.
        workers: processes; 1 is this one.

    Raises:
        TunerError: as the encoder does.
    """
    if workers == 1:
        yield from ((chunk, encoder(chunk)) for chunk in chunks)
        return
    with _processes(encoder, workers) as pool, ThreadPoolExecutor(workers) as threads:
        ahead: deque[tuple[Chunk, Future[Encoded]]] = deque()
        for chunk in chunks:
            ahead.append((chunk, threads.submit(_ask, pool, chunk)))
            if len(ahead) > 2 * workers:
                yield ahead[0][0], ahead.popleft()[1].result()
        while ahead:
            yield ahead[0][0], ahead.popleft()[1].result()


def serve() -> None:
    """What a started process does: encode what it is given until there is nothing more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked, answers = sys.stdin.buffer, sys.stdout.buffer
    encoder: Encoder = pickle.load(asked)
    while True:
        try:
            chunk = pickle.load(asked)
        except EOFError:
            return
        try:
            answer: Any = encoder(chunk)
        except Exception as error:  # raised again by the process that asked
            answer = error
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


@contextmanager
def _processes(encoder: Encoder, number: int) -> Iterator[queue.SimpleQueue[subprocess.Popen[bytes]]]:
    """Processes that have the encoder, those that are free in a queue."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from tuner.data.workers import serve; serve()"
    # One core each: they are as many as the cores that there are
    env = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    started, free = [], queue.SimpleQueue[subprocess.Popen[bytes]]()
    content = pickle.dumps(encoder, pickle.HIGHEST_PROTOCOL)
    try:
        for _ in range(number):
            started.append(
                subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
            )
            _write(started[-1], content)
            free.put(started[-1])
        yield free
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _ask(free: queue.SimpleQueue[subprocess.Popen[bytes]], chunk: Chunk) -> Encoded:
    process = free.get()
    try:
        _write(process, pickle.dumps(chunk, pickle.HIGHEST_PROTOCOL))
        assert process.stdout is not None
        answer = pickle.load(process.stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
        raise RuntimeError(f"a process that tokenizes ended with code {process.wait()}") from error
    finally:
        free.put(process)
    if isinstance(answer, Exception):
        raise answer
    assert isinstance(answer, Encoded)
    return answer


def _write(process: subprocess.Popen[bytes], content: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(content)
    process.stdin.flush()
