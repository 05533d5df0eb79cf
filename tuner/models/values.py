"""Whether a value of a `config.json` is what the annotation of its key says.

`tuner.config` judges a configuration by the same annotations, read as text; a folder that is loaded from Python is
judged here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


@cache
def annotations_of(cls: Any) -> Mapping[str, Any]:
    """The annotation of each key, bounds included."""
    return get_type_hints(cls, include_extras=True)


def accepts(value: Any, annotation: Any) -> bool:
    """Whether `value` is of `annotation`: a basic type, a bound, a choice, a list, a mapping or a union of these."""
    kind, inner = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        limits = [(COMPARE[sign], float(number)) for sign, number in (bound.split() for bound in inner[1:])]
        return accepts(value, inner[0]) and all(holds(value, limit) for holds, limit in limits)
    if kind in (Union, UnionType):
        return any(accepts(value, one) for one in inner)
    if kind is Literal:
        return value in inner
    if kind is list:
        return isinstance(value, list) and all(accepts(one, inner[0]) for one in value)
    if kind is dict:
        return isinstance(value, dict) and all(accepts(one, inner[1]) for one in value.values())
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is annotation


def expected(annotation: Any) -> str:
    """What a person reads after "expected"."""
    kind, inner = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return f"{expected(inner[0])} {' and '.join(inner[1:])}"
    if kind in (Union, UnionType):
        return " or ".join(map(expected, inner))
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind is list:
        return f"a list, each item {expected(inner[0])}"
    return "a mapping" if kind is dict else WORDS[annotation]
