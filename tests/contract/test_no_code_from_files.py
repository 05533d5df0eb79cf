"""What is read from files is data: a pickle is read as tensors alone, or comes from a process that was started here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tuner

ROOT = Path(tuner.__file__).parents[1]
FILES = {
    str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8"))
    for package in ("tuner", "sweeper", "hydra_plugins")
    for file in sorted((ROOT / package).rglob("*.py"))
}
UNPICKLES = {
    "tuner/data/workers.py": "pipes of the processes that it starts to tokenize, and in these that of their parent",
    "sweeper/launchers/jobs.py": "results of jobs that this process has submitted, in a folder that it made for them",
}
"""The modules that may unpickle, and from where."""

NEVER = {
    *("eval", "exec", "compile", "__import__", "runpy.run_path", "runpy.run_module"),
    *("marshal.load", "marshal.loads", "shelve.open", "dill.load", "dill.loads", "joblib.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.hub.load", "torch.jit.load"),
}
UNPICKLING = {f"{module}.{name}" for module in ("pickle", "cloudpickle") for name in ("load", "loads", "Unpickler")}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """The name of what is called, by the module it was imported from, and the call."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names if alias.asname}
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            first, dot, rest = called.partition(".")
            yield f"{names.get(first, first)}{dot}{rest}", node


def keyword(call: ast.Call, name: str) -> object:
    found = [argument.value for argument in call.keywords if argument.arg == name]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


def refused(name: str, tree: ast.AST) -> list[str]:
    """The calls of a module that might run what a file says."""
    wrong = []
    for called, call in calls(tree):
        loads_more = called == "torch.load" and keyword(call, "weights_only") is not True
        allows = any(argument.arg in ("allow_pickle", "trust_remote_code") for argument in call.keywords)
        if called in NEVER or loads_more or allows or (called in UNPICKLING and name not in UNPICKLES):
            wrong.append(f"{name}:{call.lineno}: {ast.unparse(call)}")
    return wrong


@pytest.mark.parametrize("name", FILES)
def test_no_module_runs_what_a_file_says(name: str) -> None:
    assert refused(name, FILES[name]) == []


def test_the_modules_that_unpickle_are_those_that_are_listed() -> None:
    found = {name for name, tree in FILES.items() if {called for called, _ in calls(tree)} & UNPICKLING}
    assert found == set(UNPICKLES)
    loading = [name for name, tree in FILES.items() if "torch.load" in {called for called, _ in calls(tree)}]
    assert len(loading) >= 2


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(file)",
        "import torch\ntorch.load(file, weights_only=False)",
        "import torch\ntorch.load(file, weights_only=safe)",
        "import torch as t\nt.load(file)",
        "from torch import load\nload(file)",
        "from torch import load as read\nread(file, map_location='cpu')",
        "import pickle\npickle.load(file)",
        "from pickle import loads\nloads(text)",
        "import pickle as p\np.Unpickler(file).load()",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "eval(text)",
    ],
)
def test_it_would_be_seen(text: str) -> None:
    assert len(refused("tuner/some.py", ast.parse(text))) == 1
    assert refused("tuner/some.py", ast.parse("import torch\ntorch.load(file, weights_only=True)")) == []
