"""The notebooks are valid, stored without outputs, use the public API only, and run."""

from __future__ import annotations

import ast
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


def test_first_run_was_found() -> None:
    assert FOLDER / "first_run.ipynb" in NOTEBOOKS


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
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read(FOLDER / "first_run.ipynb")
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute(
        env=dict(os.environ)
    )
    (summary_file,) = tmp_path.glob("outputs/*/*/summary.json")
    summary = json.loads(summary_file.read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert f"validation loss {summary['val_loss_before']:.3f} before, {summary['val_loss']:.3f} after 3 steps" in text
    assert "before: " in text
    assert "after: " in text
