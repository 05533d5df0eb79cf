"""The notebooks are valid, stored without outputs, use the public API only, and run."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import shlex
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

import tuner

FOLDER = Path(tuner.__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(file: Path) -> nbformat.NotebookNode:
    return nbformat.read(file, as_version=4)


def source(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[nbformat.NotebookNode]:
    """The outputs of a notebook's cells, run in `folder`."""
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    notebook = read(FOLDER / name)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute(env=dict(os.environ))
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(outputs: list[nbformat.NotebookNode]) -> str:
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def shown(outputs: list[nbformat.NotebookNode], kind: str) -> list[str]:
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


@pytest.mark.parametrize("name", ["first_run.ipynb", "compare_a_sweep.ipynb"])
def test_was_found(name: str) -> None:
    assert FOLDER / name in NOTEBOOKS


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_is_valid_and_has_no_outputs(file: Path) -> None:
    notebook = read(file)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert [cell for cell in code if cell.outputs or cell.execution_count is not None] == []


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_uses_the_public_api_only(file: Path) -> None:
    nodes = list(ast.walk(ast.parse(source(read(file)))))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tuner"}
    assert names
    assert names <= set(tuner.__all__)
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.startswith("tuner.")}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_commands_it_names_are_complete(file: Path) -> None:
    text = "\n".join(cell.source for cell in read(file).cells if cell.cell_type == "markdown")
    commands = re.findall(r"`python -m tuner (merge|generate|evaluate)\b ?([^`]*)`", text)
    assert commands
    for verb, words in commands:
        given = {word.partition("=")[0] for word in shlex.split(words)}
        values = yaml.safe_load((FOLDER.parent / "conf" / "verb" / f"{verb}.yaml").read_text())
        assert {key for key, value in values.items() if value == "???"} <= given, (verb, words)


SHORT = "train.max_steps=3 train.batch_size=2 data.max_val_samples=8 train.num_samples=1 train.max_new_tokens=4"


@pytest.mark.slow
def test_first_run_trains_plots_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRST_RUN_LENGTH", SHORT)
    outputs = executed("first_run.ipynb", tmp_path, monkeypatch)
    (summary_file,) = tmp_path.glob("outputs/*/*/summary.json")
    summary = json.loads(summary_file.read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    assert shown(outputs, "image/png")
    text = printed(outputs)
    assert f"validation loss {summary['val_loss_before']:.3f} before, {summary['val_loss']:.3f} after 3 steps" in text
    assert "before: " in text
    assert "after: " in text


@pytest.mark.slow
def test_compare_a_sweep_shows_every_trial_in_table_frames_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    outputs = executed("compare_a_sweep.ipynb", tmp_path, monkeypatch)
    with (tmp_path / "sweep" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished"] * 8
    points = {(row["peft.lora_rank"], row["peft.lora_alpha"], row["optimizer"]) for row in rows}
    assert points == {(rank, alpha, name) for rank in "28" for alpha in ("8", "32") for name in ("adamw", "sgd")}
    assert "8 trials by val_loss" in printed(outputs)
    results, runs = shown(outputs, "text/html")
    for row in rows:
        assert row["trial"] in printed(outputs)
        assert row["trial"] in results
        assert row["trial"] in runs
    for column in ("objective", "seconds", "peak_memory_mib", "peft.lora_rank", "optimizer"):
        assert f"<th>{column}</th>" in results
        assert re.search(rf"<th>(metrics|tags)\.{re.escape(column)}</th>", runs), column
    assert runs.count("<td>FINISHED</td>") == 8
    assert len(shown(outputs, "image/png")) == 3  # the grid, what it costs, the curves
