"""Hydra finds the launchers and sweepers wherever the package is imported from, and so do the processes of trials.

`tests/contract/test_wheel.py` does the same with a wheel.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import tuner

CHECKOUT = Path(tuner.__file__).parents[1]
OURS = {"GridSweeper", "LocalLauncher", "SlurmLauncher"}
APPLICATION = """
import hydra
@hydra.main(version_base="1.3", config_path=None)
def task(config):
    print("ran", config.n)
task()
"""


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command in `folder` with nothing of ours in PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def plugins(python: str, folder: Path) -> set[str]:
    done = run([python, "-m", "tuner", "--info", "plugins"], folder)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of an environment that leads to the checkout by a .pth line, as an editable install does."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    (site_packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n{CHECKOUT}\n")
    return str(folder / "bin" / "python")


def test_in_a_checkout() -> None:
    assert plugins(sys.executable, CHECKOUT) >= OURS


def test_through_a_pth_line_from_another_folder(python: str, tmp_path: Path) -> None:
    assert plugins(python, tmp_path) >= OURS


@pytest.mark.slow
def test_a_trial_s_process_finds_what_the_command_found(python: str, tmp_path: Path) -> None:
    """An empty training set would do as well: that the trial says what is wrong with it shows that it was reached."""
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    words = ["model=tiny", "data=alpaca", "data.path=bad.jsonl", "logger=none", "hydra.sweep.dir=sweep"]
    done = run([python, "-m", "tuner", "-m", "hydra/launcher=local", *words, "seed=1"], tmp_path)
    assert done.returncode == 1
    with (tmp_path / "sweep" / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["status"] == "failed"
    assert "bad.jsonl" in row["reason"]
    assert "not valid JSON" in row["reason"]


@pytest.mark.slow
def test_in_an_application_that_is_not_ours(python: str, tmp_path: Path) -> None:
    (tmp_path / "application.py").write_text(APPLICATION)
    words = ["hydra/launcher=local", f"hydra.searchpath=[file://{CHECKOUT}/conf]", "hydra.sweep.dir=sweep"]
    done = run([python, "application.py", "-m", *words, "+n=1,2"], tmp_path)
    assert done.returncode == 0, done.stderr
    logs = [file.read_text() for file in (tmp_path / "sweep" / ".submitit").rglob("*_log.out")]
    assert sorted(line for log in logs for line in log.splitlines() if line.startswith("ran")) == ["ran 1", "ran 2"]
