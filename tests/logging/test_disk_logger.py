"""The files of a run folder: valid, whole, and equal to what was logged."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from tuner.logging.disk import DiskLogger, Generation, read_metrics, write_whole
from tuner.types import RunInfo

MakeInfo = Callable[..., RunInfo]


def _strict_json(text: str) -> object:
    def refuse(name: str) -> object:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_writes_config_overrides_and_environment_as_they_are_given(run_info: MakeInfo) -> None:
    info = run_info()
    DiskLogger(info.out).start(info)
    assert yaml.safe_load((info.out / "config.yaml").read_text()) == info.config
    assert list(yaml.safe_load((info.out / "config.yaml").read_text())) == list(info.config), (
        "the order is the reader's"
    )
    assert yaml.safe_load((info.out / "overrides.yaml").read_text()) == info.overrides
    environment = json.loads((info.out / "environment.json").read_text())
    assert environment["dataset"] == info.dataset
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    from importlib.metadata import version

    assert environment["packages"]["torch"] == version("torch")
    assert environment["packages"]["mlflow"] == version("mlflow")


def test_every_line_is_there_while_the_run_goes_on(run_info: MakeInfo) -> None:
    info = run_info()
    disk = DiskLogger(info.out)
    disk.start(info)
    for step in range(1, 4):
        disk.log(step, {"tokens": step * 100, "train/loss": 1 / step})
        assert [row.step for row in read_metrics(info.out)] == list(range(1, step + 1))
    lines = [json.loads(line) for line in (info.out / "metrics.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [["step", "time", "tokens", "train/loss"]] * 3
    assert [line["train/loss"] for line in lines] == [1.0, 1 / 2, 1 / 3], "floats survive to the last bit"
    assert [line["tokens"] for line in lines] == [100, 200, 300]


def test_nan_and_infinity_are_valid_json_and_read_back(run_info: MakeInfo) -> None:
    info = run_info()
    disk = DiskLogger(info.out)
    disk.start(info)
    disk.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    disk.close("failed", {"objective": math.nan})
    _strict_json((info.out / "metrics.jsonl").read_text())
    assert _strict_json((info.out / "summary.json").read_text()) == {"objective": "NaN", "status": "failed"}
    (row,) = read_metrics(info.out)
    assert math.isnan(row.metrics["a"])
    assert (row.metrics["b"], row.metrics["c"]) == (math.inf, -math.inf)


def test_tensors_and_numpy_scalars_are_numbers(run_info: MakeInfo) -> None:
    import numpy
    import torch

    info = run_info()
    disk = DiskLogger(info.out)
    disk.start(info)
    disk.log(1, {"torch": torch.tensor(0.5), "numpy": numpy.float32(0.25), "nan": torch.tensor(math.nan)})  # type: ignore[dict-item]
    (row,) = read_metrics(info.out)
    assert (row.metrics["torch"], row.metrics["numpy"]) == (0.5, 0.25)
    assert math.isnan(row.metrics["nan"])


def test_a_resumed_run_drops_the_cut_line_and_the_steps_it_does_again(run_info: MakeInfo) -> None:
    info = run_info()
    disk = DiskLogger(info.out)
    disk.start(info)
    for step in range(1, 7):
        disk.log(step, {"tokens": step, "train/loss": float(step)})
        if step == 4:
            disk.log(step, {"tokens": step, "val/loss": 0.5})
    with (info.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "time": 1.0, "tok')  # killed while writing; the last checkpoint was of step 4

    resumed = DiskLogger(info.out)
    resumed.start(run_info(resumed=True))
    assert [row.step for row in read_metrics(info.out)] == [1, 2, 3, 4, 4, 5, 6]
    resumed.log(5, {"tokens": 5, "train/loss": 50.0})
    resumed.log(6, {"tokens": 6, "train/loss": 60.0})
    rows = read_metrics(info.out)
    assert [(row.step, row.metrics.get("train/loss")) for row in rows] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (4, None), (5, 50.0), (6, 60.0)
    ]  # fmt: skip


def test_a_resumed_run_that_evaluates_first_keeps_the_training_line_of_that_step(run_info: MakeInfo) -> None:
    info = run_info()
    disk = DiskLogger(info.out)
    disk.start(info)
    disk.log(4, {"tokens": 4, "train/loss": 4.0})
    resumed = DiskLogger(info.out)
    resumed.start(run_info(resumed=True))
    resumed.log(4, {"tokens": 4, "val/loss": 0.5})
    assert [dict(row.metrics) for row in read_metrics(info.out)] == [
        {"tokens": 4, "train/loss": 4.0},
        {"tokens": 4, "val/loss": 0.5},
    ]


def test_a_fresh_run_in_an_old_folder_begins_anew(run_info: MakeInfo) -> None:
    info = run_info()
    for _ in range(2):
        disk = DiskLogger(info.out)
        disk.start(info)
        disk.log(1, {"train/loss": 1.0})
    assert len(read_metrics(info.out)) == 1


def test_samples_and_summary(run_info: MakeInfo) -> None:
    info = run_info()
    disk = DiskLogger(info.out)
    disk.start(info)
    generation = Generation("def f()", "Do f.", "¿?", "Does f.")
    assert json.loads(disk.samples([generation]).read_text()) == [asdict(generation)]
    assert disk.close("finished", {"steps": 3, "out": info.out}) == {}
    assert json.loads((info.out / "summary.json").read_text()) == {
        "steps": 3,
        "out": str(info.out),
        "status": "finished",
    }


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half \ud800")  # a lone surrogate cannot be written
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
    assert path.read_text() == "old"


def test_lines_survive_a_process_that_is_killed(run_info: MakeInfo) -> None:
    info = run_info()
    script = f"""
import os, signal
from pathlib import Path
from tuner.logging.disk import DiskLogger
from tuner.types import RunInfo
disk = DiskLogger(Path({str(info.out)!r}))
disk.start(RunInfo(Path({str(info.out)!r}), {{}}, [], {{}}))
disk.log(1, {{"train/loss": 2.5}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False)
    assert killed.returncode == -9
    assert [row.metrics["train/loss"] for row in read_metrics(info.out)] == [2.5]


def test_what_a_killed_process_logged_past_its_checkpoint_is_not_there_twice(run_info: MakeInfo) -> None:
    """Killed behind the evaluation of step 2, saved after step 1 or after step 2 and before its evaluation."""
    info = run_info()
    killed = DiskLogger(info.out)
    killed.start(info)
    for step in (1, 2):
        killed.log(step, {"tokens": step * 100, "train/loss": float(step)})
        killed.log(step, {"tokens": step * 100, "val/loss": float(step)})

    trained_again = DiskLogger(info.out)
    trained_again.start(replace(info, resumed=True))
    trained_again.log(2, {"tokens": 200, "train/loss": 7.0})
    assert [row.metrics for row in read_metrics(info.out) if row.step == 2] == [{"tokens": 200, "train/loss": 7.0}]
    trained_again.log(2, {"tokens": 200, "val/loss": 8.0})

    evaluated_again = DiskLogger(info.out)
    evaluated_again.start(replace(info, resumed=True))
    evaluated_again.log(2, {"tokens": 200, "val/loss": 9.0})
    rows = [{**row.metrics, "step": row.step} for row in read_metrics(info.out)]
    assert [(row["step"], row.get("train/loss"), row.get("val/loss")) for row in rows] == [
        (1, 1.0, None),
        (1, None, 1.0),
        (2, 7.0, None),
        (2, None, 9.0),
    ]
