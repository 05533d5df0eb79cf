"""What a stopped run prints continues it, however it was started; what is no continuation of it is refused."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import tuner
from tuner.checkpoint.lock import only_run_in
from tuner.errors import Interrupted
from tuner.measure import Speed

STEPS = 4


@pytest.fixture(scope="module")
def words(shell: Any) -> list[str]:
    numbers = [f"train.max_steps={STEPS}", "train.val_every_steps=null", "train.num_samples=0", "train.num_threads=1"]
    return ["model=tiny", *shell.data, "logger=none", *numbers]


@contextmanager
def ctrl_c_at_the_second_step() -> Iterator[None]:
    """A signal to this process, as `inside` and the Python call run in it."""
    add, steps = Speed.add, []

    def counted(speed: Speed, tokens: int, seconds: float) -> None:
        add(speed, tokens, seconds)
        steps.append(tokens)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Speed, "add", counted)
        yield


def resume_line(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("resume: ")]
    return line.removeprefix("resume: ")


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_the_printed_command_keeps_the_switches(shell: Any, words: list[str], resume: str) -> None:
    own = shell.folder / "own" / "schedule"
    own.mkdir(parents=True, exist_ok=True)
    (own / "mine.yaml").write_text("defaults: [cosine, _self_]\nwarmup_steps: 3\n")
    with ctrl_c_at_the_second_step():
        done = shell.inside(
            "--config-dir", "own", *words, "schedule=mine", f"checkpoint.resume={resume}", f"out=switched-{resume}"
        )
    assert done.code == 130
    command = shlex.split(resume_line(done.err))
    assert command[:4] == ["python", "-m", "tuner", "--config-dir=own"]
    resumed = shell.inside(*command[3:])
    assert (resumed.code, resumed.err) == (0, "")
    assert f"resumed at step 2 of {STEPS}" in resumed.out


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_python_call_is_continued_by_the_printed_python_call(
    shell: Any, words: list[str], resume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    cfg = tuner.compose([*words, "seed=3", f"checkpoint.resume={resume}", f"out='{tmp_path / 'a run'}'"])
    with ctrl_c_at_the_second_step(), pytest.raises(Interrupted) as caught:
        tuner.run(cfg)
    call = resume_line(str(caught.value))
    assert call.startswith("tuner.run(OmegaConf.")
    monkeypatch.chdir("/")
    summary = eval(call, {"tuner": tuner, "OmegaConf": OmegaConf})
    torch.set_num_threads(threads)
    assert (summary.status, summary.steps, summary.out) == ("finished", STEPS, str(tmp_path / "a run"))


def test_a_folder_at_work_is_refused_before_anything_is_loaded(shell: Any, words: list[str]) -> None:
    folder = shell.folder / "busy"
    with only_run_in(folder):
        done = shell.inside(*words, "out=busy")
    line = f"error: {folder}: another process is at work on this run; wait for its end, or give another out\n"
    assert (done.code, done.out, done.err) == (2, "", line)


def test_an_unfinished_run_of_other_data_or_fewer_steps_is_refused_in_a_line(shell: Any, words: list[str]) -> None:
    with ctrl_c_at_the_second_step():
        assert shell.inside(*words, "out=unfinished").code == 130
    fewer = shell.inside(*words, "train.max_steps=1", "out=unfinished")
    said = f"{shell.folder / 'unfinished'} has done 2 steps and 1 are asked for; say train.max_steps=2 or more"
    assert (fewer.code, fewer.err) == (2, f"error: {said}, or another out\n")

    file = shell.folder / "sums.jsonl"
    before = file.read_text()
    try:
        file.write_text(before.replace("It is", "That is"))
        other = shell.inside(*words, "out=unfinished")
    finally:
        file.write_text(before)
    assert other.code == 2
    assert other.err.startswith("error: the data is not what this run began with: its fingerprint was ")
    assert other.err.count("\n") == 1
    assert shell.inside(*words, "out=unfinished").code == 0
