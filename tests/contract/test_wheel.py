"""A wheel, installed in another environment and used from another folder, does what the checkout does."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import tuner
from tuner.config import conf_dir

CHECKOUT = Path(tuner.__file__).parents[1]
Command = Callable[..., str]

pytestmark = pytest.mark.slow


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(CHECKOUT))
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that holds the wheel; the libraries it needs are those of the running one.

    A .pth line adds that folder of libraries and not what is behind the .pth files in there, such as the line of an
    editable install that leads to the checkout.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    pip("--python", str(folder / "bin/python"), "install", "--no-deps", "--no-index", str(wheel))
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture
def installed(environment: Path) -> Command:
    """Runs a program of that environment in the current folder and returns what it wrote to stdout."""
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *words: str) -> str:
        command = [str(environment / "bin" / program), *words]
        done = subprocess.run(command, env=others, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_holds_the_package_with_its_configurations_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = ("tuner", "sweeper", "hydra_plugins")
    modules = {file.relative_to(CHECKOUT).as_posix() for name in packages for file in (CHECKOUT / name).rglob("*.py")}
    configurations = {f"tuner/conf/{file.relative_to(conf_dir()).as_posix()}" for file in conf_dir().rglob("*.yaml")}
    assert len(configurations) > 30
    assert {name for name in names if ".dist-info/" not in name} == modules | configurations


def test_is_what_the_other_environment_imports(environment: Path, installed: Command) -> None:
    script = "import tuner, tuner.config; print(tuner.__file__, tuner.config.conf_dir(), sep='\\n')"
    for file in installed("python", "-c", script).splitlines():
        assert Path(file).is_relative_to(environment)


def test_has_the_console_script(installed: Command) -> None:
    shown = installed("tuner", "--cfg", "job", "peft=qlora")
    assert shown == subprocess.check_output([sys.executable, "-m", "tuner", "--cfg", "job", "peft=qlora"], text=True)
    assert "lora_rank:" in shown


MAIN_JOB = ["peft=qlora", "precision=bf16"]
SHORTER = ["train.batch_size=2", "data.max_val_samples=8", "train.num_samples=1", "train.max_new_tokens=4"]


@pytest.mark.parametrize("words", [["model=tiny"], [*MAIN_JOB, *SHORTER]], ids=["tiny", "main-job"])
def test_trains_from_another_folder(words: list[str], installed: Command, tmp_path: Path) -> None:
    installed("python", "-m", "tuner", *words, "train.max_steps=6", "logger=none", "out=run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 6)
    assert summary["val_loss"] < summary["val_loss_before"]
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_sweeps_in_parallel_processes_from_another_folder(installed: Command, tmp_path: Path) -> None:
    words = ["model=tiny", "peft.lora_rank=2,4", "train.max_steps=2", "train.num_samples=0", "logger=none"]
    shown = installed("python", "-m", "tuner", "-m", "hydra/launcher=local", *words, "hydra.sweep.dir=sweep")
    with (tmp_path / "sweep/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert {row["peft.lora_rank"] for row in rows} == {"2", "4"}
    assert len(list((tmp_path / "sweep/.submitit").rglob("*_result.pkl"))) == 2, "each in a process of its own"
    assert installed("sweeper", "status", "sweep").count("finished") == 2
    assert shown.count("finished") >= 2
