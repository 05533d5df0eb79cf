"""The signatures of our own classes and functions, read from their source: the schema of every YAML.

Ours are the packages that are installed side by side: `tuner`, `sweeper` and the doorway `hydra_plugins`.

Nothing is imported, so a whole configuration is checked in milliseconds and before torch is needed.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tuner.config.kinds import RUN_TIME, Kind, kind_of, member, record

PACKAGES = Path(__file__).resolve().parents[2]
OURS = ("tuner", "sweeper", "hydra_plugins")

Definition = ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class Signature:
    """What a `_target_` is called with.

    Attributes:
        keys: each parameter's kind, in order.
        defaults: the parameters that have a default in Python.
        is_open: it takes further keys (`**options`).
    """

    keys: Mapping[str, Kind]
    defaults: frozenset[str]
    is_open: bool = False


@cache
def signature_of(target: str) -> Signature:
    """The signature of `<package of ours>.<...>.<module>.<Name>`.

    Raises:
        LookupError: no such module, or no class or function of that name is defined in it.
    """
    module, _, name = target.rpartition(".")
    return _signature(module, name)


@cache
def source_of(module: str) -> ast.Module:
    """Syntax tree of a module of ours."""
    parts = module.split(".")
    path = PACKAGES.joinpath(*parts)
    file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    if parts[0] not in OURS or not file.is_file():
        raise LookupError(f"no module {module}")
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def definitions(module: str) -> dict[str, Definition]:
    """Classes and functions defined at the top level of a module."""
    body = source_of(module).body
    return {node.name: node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def constant_of(target: str, name: str) -> Any:
    """A literal that a class of ours assigns to a name in its body.

    Raises:
        LookupError: no such module, class or assignment.
    """
    module, _, class_name = target.rpartition(".")
    found = definitions(module).get(class_name)
    for node in found.body if isinstance(found, ast.ClassDef) else []:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.literal_eval(node.value)
    raise LookupError(f"{target} assigns no {name}")


def _signature(module: str, name: str) -> Signature:
    found = definitions(module).get(name)
    if found is None:
        raise LookupError(f"{module} defines no {name}")
    if isinstance(found, ast.FunctionDef):
        return _of_function(module, found, skip=0)
    methods = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
    if "__init__" in methods:
        return _of_function(module, methods["__init__"], skip=1)
    inherited = _of_bases(module, found)
    return _of_fields(module, found, inherited) if _is_dataclass(found) else inherited


def _of_function(module: str, function: ast.FunctionDef, skip: int) -> Signature:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    with_default = positional[len(positional) - len(arguments.defaults) :]
    with_default += [a for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None]
    keys = {a.arg: _kind(module, a.annotation) for a in [*positional[skip:], *arguments.kwonlyargs]}
    return Signature(keys, frozenset(a.arg for a in with_default), arguments.kwarg is not None)


def _of_fields(module: str, node: ast.ClassDef, inherited: Signature) -> Signature:
    annotated = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
    fields = [f for f in annotated if not ast.unparse(f.annotation).startswith("ClassVar")]
    keys = {f.target.id: _kind(module, f.annotation) for f in fields if isinstance(f.target, ast.Name)}
    defaults = {f.target.id for f in fields if isinstance(f.target, ast.Name) and f.value is not None}
    return Signature({**inherited.keys, **keys}, inherited.defaults | defaults)


def _of_bases(module: str, node: ast.ClassDef) -> Signature:
    """What a class without an `__init__` inherits from its first base of ours; without such a base, no keys."""
    for base in node.bases:
        if isinstance(base, ast.Name) and (home := _home(module, base.id)):
            return _signature(*home)
    return Signature({}, frozenset())


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return any(isinstance(name, ast.Name) and name.id == "dataclass" for name in names)


def _is_protocol(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def _kind(module: str, annotation: ast.expr | None) -> Kind:
    return RUN_TIME if annotation is None else kind_of(annotation, lambda name: _named(module, name))


@cache
def _named(module: str, name: str) -> Kind:
    """The kind a name stands for in a module of ours."""
    home = _home(module, name)
    if home is None:
        return RUN_TIME
    module, name = home
    if (found := definitions(module).get(name)) is not None:
        if isinstance(found, ast.ClassDef) and _is_protocol(found):
            return member()
        return record(module, name) if isinstance(found, ast.ClassDef) and _is_dataclass(found) else RUN_TIME
    return _kind(module, _aliases(module)[name])


def _aliases(module: str) -> dict[str, ast.expr]:
    """Names assigned at the top level: `PositiveInt = Annotated[int, "> 0"]`."""
    assigned = [node for node in source_of(module).body if isinstance(node, ast.Assign)]
    return {t.id: node.value for node in assigned for t in node.targets if isinstance(t, ast.Name)}


def _home(module: str, name: str) -> tuple[str, str] | None:
    """The module of ours that defines a name used in `module`, and its name there; None for a foreign one."""
    if name in definitions(module) or name in _aliases(module):
        return module, name
    for node in ast.walk(source_of(module)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _home(node.module, alias.name)
    return None
