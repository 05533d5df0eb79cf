"""What values an annotation accepts, read from its source text: the types of configuration keys.

The vocabulary is `int float bool str`, `Literal[...]`, `X | None`, `list[X]`, `dict[str, X]`, `Annotated[X, "> 0"]`,
names bound to these, dataclasses (a nested group of keys) and protocols (a member of a config group, built from its
`_target_`). Whatever else an annotation says is a run-time argument, as the parameters an optimizer steps.

Reading text instead of importing keeps torch out of the check; pydantic over imported classes would cost seconds.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MISSING = "???"
COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


@dataclass(frozen=True)
class Kind:
    """The values a key may have.

    Attributes:
        text: what a person reads after "expected".
        accepts: whether a plain value is one of them.
        record: module and name of the dataclass that holds the keys below this one.
        member: built from a `_target_` of its own.
        members: a mapping of names to members.
        run_time: not a configuration key.
    """

    text: str
    accepts: Callable[[Any], bool]
    record: tuple[str, str] | None = None
    member: bool = False
    members: bool = False
    run_time: bool = False


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


BASIC = {
    "int": Kind("a whole number", _is_int),
    "float": Kind("a number", _is_number),
    "bool": Kind("true or false", lambda value: isinstance(value, bool)),
    "str": Kind("text", lambda value: isinstance(value, str)),
    "None": Kind("null", lambda value: value is None),
    "list": Kind("a list", lambda value: isinstance(value, list)),
    "dict": Kind("a mapping", lambda value: isinstance(value, dict)),
    "Any": Kind("anything", lambda value: True),
}
RUN_TIME = Kind("a run-time argument", lambda value: False, run_time=True)


def record(module: str, name: str) -> Kind:
    return Kind("a group of keys", lambda value: isinstance(value, dict), record=(module, name))


def member() -> Kind:
    return Kind(
        "a member of a config group", lambda value: isinstance(value, dict) and "_target_" in value, member=True
    )


def union(kinds: list[Kind]) -> Kind:
    if any(kind.run_time for kind in kinds):
        return RUN_TIME
    return Kind(
        " or ".join(kind.text for kind in kinds),
        lambda value: any(kind.accepts(value) for kind in kinds),
        member=any(kind.member for kind in kinds),
    )


def literal(values: list[Any]) -> Kind:
    names = ", ".join(str(value) for value in values)
    # 1 == True: compare types too, so that Literal[1] does not take true.
    return Kind(
        names if len(values) == 1 else f"one of {names}",
        lambda value: any(type(value) is type(v) and value == v for v in values),
    )


def list_of(item: Kind) -> Kind:
    if item.run_time:
        return RUN_TIME
    return Kind(
        f"a list, each item {item.text}",
        lambda value: isinstance(value, list) and all(item.accepts(v) for v in value),
    )


def dict_of(item: Kind) -> Kind:
    if item.run_time:
        return RUN_TIME
    return Kind(
        f"a mapping, each value {item.text}",
        lambda value: isinstance(value, dict) and all(item.accepts(v) for v in value.values()),
        members=item.member,
    )


def bounded(base: Kind, bounds: list[str]) -> Kind:
    """`base` within `bounds`, each as "> 0"."""
    limits = [(COMPARE[sign], float(number)) for sign, number in (bound.split() for bound in bounds)]
    return Kind(
        f"{base.text} {' and '.join(bounds)}",
        lambda value: base.accepts(value) and all(holds(value, limit) for holds, limit in limits),
    )


def kind_of(annotation: ast.expr, name_kind: Callable[[str], Kind]) -> Kind:
    """The kind of an annotation's syntax tree.

    Args:
        annotation: the expression after the colon.
        name_kind: resolves a name that is not basic in the module the annotation stands in.
    """
    match annotation:
        case ast.Constant(value=None):
            return BASIC["None"]
        case ast.Name(id=name):
            return BASIC[name] if name in BASIC else name_kind(name)
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return union([kind_of(left, name_kind), kind_of(right, name_kind)])
        case ast.Subscript(value=ast.Name(id=outer), slice=inner):
            return _subscript(outer, inner.elts if isinstance(inner, ast.Tuple) else [inner], name_kind)
    return RUN_TIME


def _subscript(outer: str, inner: list[ast.expr], name_kind: Callable[[str], Kind]) -> Kind:
    match outer:
        case "Literal":
            return literal([ast.literal_eval(value) for value in inner])
        case "Annotated":
            return bounded(kind_of(inner[0], name_kind), [ast.literal_eval(bound) for bound in inner[1:]])
        case "list" | "Sequence":
            return list_of(kind_of(inner[0], name_kind))
        case "dict" | "Mapping":
            return dict_of(kind_of(inner[1], name_kind))
    return RUN_TIME
