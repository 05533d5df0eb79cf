"""The commands as a person gives them: processes of their own in an empty folder."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tuner
from tuner.__main__ import dispatch, reported

CHECKOUT = Path(tuner.__file__).parents[1]
NUM_EXAMPLES = 120


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


class Shell:
    """Runs `python -m tuner` with words in `folder`.

    Attributes:
        folder: working directory, where outputs/ and mlflow.db appear.
        data: the words that choose a small local dataset.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "sums.jsonl"
        rows = [
            {"instruction": f"Add {i} to {i % 7}.", "input": "", "output": f"It is {i + i % 7}."}
            for i in range(NUM_EXAMPLES)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.data = ["data=alpaca", f"data.path={file}", "data.val_fraction=0.1"]
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "HYDRA_"))}
        self.env |= {"PYTHONPATH": str(CHECKOUT), "COLUMNS": "120", "LINES": "40", "TERM": "xterm-256color"}
        # A command that is printed says `python`: here it is this one.
        self.env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), self.env.get("PATH", "")])

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """A command in a session of its own, so that a signal to it reaches no one else."""
        return subprocess.Popen(
            [sys.executable, "-m", "tuner", *words],
            cwd=self.folder,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self, process: subprocess.Popen[str]) -> Done:
        out, err = process.communicate(timeout=900)  # the longest takes 3 minutes on a machine that does nothing else
        return Done(process.returncode, out, err)

    def __call__(self, *words: str, **env: str) -> Done:
        return self.end(self.start(*words, **env))

    def inside(self, *words: str, debug: bool = False, **env: str) -> Done:
        """The same command in this process, which has torch in memory already: a tenth of the time."""
        out, err = io.StringIO(), io.StringIO()
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.folder)
            for name in [name for name in os.environ if name.startswith(("MLFLOW_", "HYDRA_"))]:
                patch.delenv(name)
            for name, value in env.items():
                patch.setenv(name, value)
            torch.set_num_threads(1)
            try:
                code = reported(lambda: dispatch(words), debug)
            finally:
                torch.set_num_threads(threads)
        return Done(code, out.getvalue(), err.getvalue())

    def line(self, command: str) -> Done:
        """A line as a person copies it from the screen."""
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False, timeout=300
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def rows(self, run: str) -> list[dict[str, float]]:
        """The lines of a run's metrics.jsonl, an unfinished one left out."""
        file = self.folder / run / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def at_step(self, process: subprocess.Popen[str], run: str, step: int, signals: Sequence[signal.Signals]) -> Done:
        """Wait until `step` is logged, send `signals`, a moment apart, and wait for the end."""
        deadline = time.monotonic() + 120
        while not any(row["step"] >= step and "train/loss" in row for row in self.rows(run)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        for number in signals:
            process.send_signal(number)
            time.sleep(0.02)
        return self.end(process)


@pytest.fixture(scope="session")
def shell_in() -> Callable[[Path], Shell]:
    return Shell


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """One folder for the commands of a module."""
    return Shell(tmp_path_factory.mktemp("commands"))
