"""`ls runs`: the true state of every run folder, told apart by summary, heartbeat and the process it names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import tuner
from tuner.errors import ConfigError
from tuner.logging.heartbeat import HEARTBEAT, STALE_S, Beat
from tuner.logging.process import machine_id, process_start
from tuner.runs import state_of
from tuner.types import Summary
from tuner.verbs.ls import ls

HERE = Beat("here", machine_id(), os.getpid(), str(process_start(os.getpid())), None, 7, 20, "again", None)
GONE = replace(HERE, process_start="1")
ELSEWHERE = replace(HERE, machine="another")
NO_ROOM = replace(HERE, reason="no room")

CONFIG = {
    "model": {
        "_target_": "tuner.models.llama.Llama",
        "path": "/models/small",
        "source": None,
        "revision": None,
        "package": None,
    },
    "data": {"_target_": "tuner.data.pydoc.PythonDocumentation"},
    "peft": {"name": "lora", "lora_rank": 8, "lora_alpha": 16},
    "quantization": {"_target_": "tuner.quantization.nf4.NF4"},
    "train": {"max_steps": 40},
    "checkpoint": {"resume": "auto"},
}


def make(
    out: Path,
    status: str | None = None,
    beat: Beat | None = None,
    *,
    age_s: float = 0.0,
    config: bool = True,
    began: bool = True,
    **numbers: Any,
) -> Path:
    """A run folder whose heartbeat is `age_s` old; its process began two seconds after the summary was written."""
    out.mkdir(parents=True)
    now = time.time()
    if config:
        (out / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        (out / "overrides.yaml").write_text("[seed=1]\n")
    if began:
        (out / "environment.json").write_text("{}")
        rows = [{"step": 8, "time": now, "train/loss": 1.0}, {"step": 8, "time": now, "val/loss": 2.5}, {"step": 9}]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10, "ti')
        os.utime(out / "metrics.jsonl", (now - age_s, now - age_s))
    if status is not None:
        summary = {**asdict(Summary(status, str(out), resume="go on")), **numbers}
        (out / "summary.json").write_text(json.dumps(summary))
        os.utime(out / "summary.json", (now - age_s - 5, now - age_s - 5))
    if beat is not None:
        (out / HEARTBEAT).write_text(json.dumps(asdict(replace(beat, began_s=beat.began_s or now - age_s - 3))))
        os.utime(out / HEARTBEAT, (now - age_s, now - age_s))
    return out


STATES: dict[str, tuple[dict[str, Any], str]] = {
    "finished": ({"status": "finished"}, "finished"),
    "stopped": ({"status": "stopped"}, "stopped"),
    "failed": ({"status": "failed"}, "failed"),
    "its process is there": ({"beat": HERE}, "running"),
    "its process is there and has not beaten for long": ({"beat": HERE, "age_s": 500.0}, "running"),
    "its process is gone": ({"beat": GONE}, "killed"),
    "its number is another process's": ({"beat": replace(HERE, pid=1)}, "killed"),
    "gone while it prepared": ({"beat": GONE, "config": False, "began": False}, "killed"),
    "preparing": ({"beat": HERE, "config": False, "began": False}, "running"),
    "elsewhere and fresh": ({"beat": ELSEWHERE}, "running"),
    "elsewhere and nearly stale": ({"beat": ELSEWHERE, "age_s": STALE_S - 10}, "running"),
    "elsewhere and stale": ({"beat": ELSEWHERE, "age_s": STALE_S + 10}, "killed"),
    "going on": ({"status": "stopped", "beat": HERE}, "running"),
    "killed as it went on": ({"status": "stopped", "beat": GONE}, "killed"),
    "killed after its summary": ({"status": "finished", "beat": replace(GONE, began_s=1.0)}, "finished"),
    "no room for its summary": ({"beat": NO_ROOM}, "failed"),
    "of an earlier version": ({}, "unknown"),
}


@pytest.mark.parametrize(("made", "state"), STATES.values(), ids=list(STATES))
def test_states(tmp_path: Path, made: dict[str, Any], state: str) -> None:
    out = make(tmp_path / "run", **made)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert state_of(out).state == state
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_of_a_killed_run_it_is_known_how_far_it_was(tmp_path: Path) -> None:
    state = state_of(make(tmp_path / "run", beat=GONE, age_s=100.0))
    assert (state.steps, state.total_steps, state.val_loss, state.resume) == (9, 20, 2.5, "again")
    assert state.since_s == pytest.approx(time.time() - 100, abs=5)
    assert state.reason == f"process {os.getpid()} on here is gone"
    assert state.seconds == pytest.approx(3, abs=0.1)


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = {"val_loss": 1.25, "objective": 1.25, "seconds": 61.54, "steps": 40, "total_steps": 40, "resume": None}
    make(Path("outputs/day/done"), "finished", age_s=7300.0, **numbers)
    make(Path("multirun/day/sweep/one"), "failed", age_s=200.0, reason="KeyError: 'a'\nmore", val_loss="NaN")
    make(Path("multirun/day/sweep/waiting"), began=False)
    make(Path("outputs/early"), beat=GONE, config=False, began=False)
    dead = make(Path("outputs/dead"), beat=GONE, age_s=20.0)
    (dead / "checkpoints" / "step-00000005").mkdir(parents=True)
    make(dead / "inside", "finished")
    make(Path("outputs/.hidden/run"), "finished")
    make(Path("elsewhere/run"), "finished")
    make(Path("outputs/live"), beat=HERE)
    (make(Path("outputs/garbled"), "finished") / "summary.json").write_text("{")
    lines = ls("runs").splitlines()
    assert lines[6] == "", lines
    assert [line.split()[0] for line in lines[1:6]] == ["finished", "failed", "killed", "killed", "running"]
    assert lines[0].split() == ["state", "steps", "val_loss", "seconds", "model", "method", "ago", "folder"]
    done = "finished 40/40 1.2500 61.5 small lora rank 8 nf4 2 h outputs/day/done"
    assert lines[1].split() == done.split()
    assert lines[2].split()[:3] == ["failed", "0/40", "nan"]
    text = "\n".join(lines[7:])
    ends = text.split("\n\n")
    assert ends[0].splitlines()[1:] == ["  KeyError: 'a'", "  resume: go on"]
    assert ends[1].startswith("killed  outputs/dead  since 20")
    first, *rest = ends[1].splitlines()
    assert first.endswith(", step 9, newest checkpoint step-00000005")
    assert rest == [f"  process {os.getpid()} on here is gone", "  resume: again"]
    assert ends[2].splitlines()[0].endswith(", step 7, no checkpoint")
    assert lines[-1].startswith("cannot be read: outputs/garbled: JSONDecodeError: ")
    assert "inside" not in text + "".join(lines)


def test_what_is_asked_for_is_listed_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ls("runs") == "no run folders in outputs (not there) and multirun (not there)"
    make(tmp_path / "a" / "run", "finished", objective=512.0, val_loss=1.0)
    for folder in ("a", "a/run", str(tmp_path)):
        assert ls("runs", folder).count("finished") == 1
    assert "objective" in ls("runs", "a").splitlines()[0]
    with pytest.raises(ConfigError, match="ls runs b: no such folder"):
        ls("runs", "b")
    with pytest.raises(ConfigError, match="a group has no folder"):
        ls("peft", "a")
    assert ls("peft").startswith("adapter")


def test_a_run_of_an_earlier_version_can_be_resumed_too(tmp_path: Path) -> None:
    make(tmp_path / "run")
    assert ls("runs", str(tmp_path)).endswith(f"  resume: python -m tuner seed=1 out={tmp_path / 'run'}")


def test_looking_keeps_no_run_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    out = make(tmp_path / "run", beat=HERE)
    (out / ".lock").write_text("")
    monkeypatch.setattr("fcntl.flock", lambda *words: opened.append(words))
    ls("runs", str(tmp_path))
    assert opened == []


SPEED = """
import sys, time
from tuner.__main__ import dispatch
text = dispatch(["ls", "runs", sys.argv[1]])
print(len(text.splitlines()), "torch" in sys.modules, time.process_time())
"""


def full_config() -> str:
    """A configuration as runs leave it."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(tuner.freeze(tuner.compose(["model=tiny", "out=x"])), resolve=True)


@pytest.mark.slow
def test_five_hundred_folders_take_no_time_and_no_torch(tmp_path: Path) -> None:
    kinds: list[Callable[[Path], Path]] = [
        lambda out: make(out, "finished"),
        lambda out: make(out, "stopped"),
        lambda out: make(out, beat=GONE),
        lambda out: make(out, beat=HERE),
        lambda out: make(out, beat=ELSEWHERE),
    ]
    config = full_config()
    row = json.dumps({"step": 1, "train/loss": 1.0, "train/lr": 1e-4, "perf/tokens_per_s": 1000.0}) + "\n"
    for number in range(500):
        out = kinds[number % len(kinds)](tmp_path / f"day-{number % 7}" / f"{number}")
        (out / "config.yaml").write_text(config)
        (out / "metrics.jsonl").write_text(row * 1000)
    done = subprocess.run(
        [sys.executable, "-c", SPEED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(tuner.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    lines, torch, seconds = done.stdout.split()
    assert (int(lines) > 500, torch) == (True, "False")
    assert float(seconds) < 2.0, "of the processor, which others may use too"
