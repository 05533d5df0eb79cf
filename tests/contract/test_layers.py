"""Imports point down, heavy libraries wait until they are used, and nothing runs at import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tuner
from tuner.config.checking import COMPONENTS

ROOT = Path(tuner.__file__).parents[1]
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("tuner", "sweeper", "hydra_plugins")
    for file in sorted((ROOT / package).rglob("*.py"))
}
BOTTOM = {
    "tuner.types",
    "tuner.errors",
    "tuner.quiet",
    "tuner.adapter_config",
    "tuner.cache",
    "tuner.hub",
    "tuner.hub_errors",
    "tuner.keeping",
    "tuner.out_of_memory",
    "tuner.row_limit",
    "tuner.sentencepiece_model",
}
COMPOSERS = ("tuner.config", "tuner.verbs", "tuner.train", "tuner.build", "sweeper")
"""Modules that may know Hydra and OmegaConf."""

FOR_SWEEPS = {"tuner", "tuner.config", "tuner.errors", "tuner.types", "tuner.tracking", "tuner.runs", "tuner.__main__"}
"""What `sweeper` may know of `tuner`: the public functions and records, and how commands end."""

HEAVY = {
    "mlflow",
    "submitit",
    "cloudpickle",
    "bitsandbytes",
    "wandb",
    "gguf",
    "rich",
    "pyarrow",
    "datasets",
    "transformers",
    "peft",
    "tensorboard",
    "huggingface_hub",
    "httpx2",
}
LIGHT = {"tuner", "tuner.__main__", "tuner.settings", *BOTTOM}
"""Modules that must cost nothing to import."""


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(tree: ast.AST, *, functions: bool) -> Iterator[ast.AST]:
    """Everything that is executed: on import only, or in functions too."""
    for child in ast.iter_child_nodes(tree):
        if is_typing_only(child) or (not functions and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        yield child
        yield from nodes(child, functions=functions)


def imports(module: str, *, functions: bool) -> set[str]:
    """Dotted names of the modules that `module` imports."""
    found: set[str] = set()
    for node in nodes(ast.parse(MODULES[module].read_text()), functions=functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


def of(packages: tuple[str, ...], module: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def components() -> list[str]:
    return [
        name for name in MODULES if of(("tuner",), name) and name.count(".") > 1 and name.split(".")[1] in COMPONENTS
    ]


def test_all_modules_were_found() -> None:
    assert len(MODULES) >= 60
    assert len(components()) >= 45
    assert {module.split(".")[1] for module in components()} == set(COMPONENTS)


@pytest.mark.parametrize("module", components())
def test_a_component_knows_only_its_package_and_the_bottom(module: str) -> None:
    own = ".".join(module.split(".")[:2])
    ours = {name for name in imports(module, functions=True) if of(("tuner",), name)}
    assert {name for name in ours if not of((own,), name)} <= BOTTOM


@pytest.mark.parametrize("module", sorted(BOTTOM))
def test_the_bottom_knows_nothing_above(module: str) -> None:
    assert {name for name in imports(module, functions=True) if of(("tuner",), name)} <= BOTTOM


def test_the_configuration_check_knows_no_component() -> None:
    config = [module for module in MODULES if of(("tuner.config",), module)]
    assert len(config) >= 7
    for module in config:
        known = {name for name in imports(module, functions=True) if of(("tuner",), name)}
        assert {name for name in known if not of(("tuner.config",), name)} <= BOTTOM


@pytest.mark.parametrize("module", [name for name in MODULES if of(("sweeper", "hydra_plugins"), name)])
def test_sweeps_are_built_on_what_is_public(module: str) -> None:
    known = {name for name in imports(module, functions=True) if of(("tuner",), name)}
    assert {name if name in MODULES else name.rpartition(".")[0] for name in known} <= FOR_SWEEPS


@pytest.mark.parametrize("module", [name for name in MODULES if of(("tuner",), name)])
def test_a_run_knows_nothing_of_sweeps(module: str) -> None:
    assert not {name for name in imports(module, functions=True) if of(("sweeper", "hydra_plugins"), name)}


@pytest.mark.parametrize("module", [name for name in MODULES if of(("sweeper.launchers",), name)])
def test_a_launcher_knows_nothing_of_trials(module: str) -> None:
    known = {name for name in imports(module, functions=True) if of(("sweeper",), name)}
    assert {name for name in known if not of(("sweeper.launchers",), name)} <= {"sweeper.errors"}


@pytest.mark.parametrize("module", MODULES)
def test_only_what_composes_knows_hydra(module: str) -> None:
    if not of(COMPOSERS, module):
        assert not {name for name in imports(module, functions=True) if of(("hydra", "omegaconf"), name)}


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_where_they_are_used(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module, functions=False)} & HEAVY


@pytest.mark.parametrize(
    "module", sorted(LIGHT | {name for name in MODULES if of(("tuner.config", "sweeper", "hydra_plugins"), name)})
)
def test_no_torch_before_a_configuration_is_right(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module, functions=False)} & {"torch", "numpy"}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_runs_at_import(module: str) -> None:
    for node in ast.parse(MODULES[module].read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_main = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        is_definition = isinstance(
            node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.FunctionDef | ast.ClassDef
        )
        assert is_docstring or is_main or is_definition or is_typing_only(node), ast.unparse(node)[:80]
