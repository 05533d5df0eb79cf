"""Which values an annotation accepts, as a table."""

from __future__ import annotations

import ast
import math
from typing import Any

import pytest

from tuner.config.kinds import RUN_TIME, Kind, kind_of
from tuner.config.signatures import signature_of

NAN, INF = math.nan, math.inf
TABLE: list[tuple[str, list[Any], list[Any]]] = [
    ("int", [0, -3], [True, 1.0, "1", None]),
    ("float", [0.5, 2], [True, "0.5", None, NAN, INF]),
    ("bool", [True, False], [0, 1, "true", None]),
    ("str", ["", "a"], [1, None, ["a"]]),
    ("int | None", [3, None], ["none", 0.5]),
    ('Literal["none", "full"]', ["none", "full"], ["nope", None, True]),
    ('bool | Literal["none", "full"]', [True, False, "full"], ["half", 1]),
    ("Literal[1, 2]", [1, 2], [True, 1.0, 3]),
    ("list[int]", [[], [1, 2]], [[1, "2"], 1, (1,)]),
    ('list[Literal["q", "k"]]', [["q"], []], [["v"], "q"]),
    ("dict[str, str]", [{}, {"a": "b"}], [{"a": 1}, []]),
    ('Annotated[int, "> 0"]', [1], [0, -1, True, 0.5]),
    ('Annotated[float, ">= 0", "< 1"]', [0, 0.0, 0.99], [1, -0.1, NAN, INF]),
    ('Annotated[int, "> 0"] | None', [1, None], [0]),
]


def kind(annotation: str) -> Kind:
    return kind_of(ast.parse(annotation, mode="eval").body, lambda name: RUN_TIME)


@pytest.mark.parametrize(("annotation", "right", "wrong"), TABLE, ids=[row[0] for row in TABLE])
def test_accepts(annotation: str, right: list[Any], wrong: list[Any]) -> None:
    assert [value for value in right if not kind(annotation).accepts(value)] == []
    assert [value for value in wrong if kind(annotation).accepts(value)] == []


def test_says_what_it_expects() -> None:
    assert kind('Annotated[float, ">= 0", "< 1"]').text == "a number >= 0 and < 1"
    assert kind('Literal["a", "b"] | None').text == "one of a, b or null"


@pytest.mark.parametrize("annotation", ["Tensor", "nn.Module", "Callable[[int], int]", "list[Tensor]", "Tensor | None"])
def test_the_rest_is_a_run_time_argument(annotation: str) -> None:
    assert kind(annotation).run_time


def test_names_are_followed_into_the_modules_that_bind_them() -> None:
    train = signature_of("tuner.settings.Run").keys["train"]
    assert train.record == ("tuner.settings", "Train")
    keys = signature_of("tuner.settings.Train").keys
    assert keys["batch_size"].text == "a whole number > 0 or auto"
    assert signature_of("tuner.settings.Run").keys["model"].member


def test_run_time_parameters_of_a_function_are_told_from_keys() -> None:
    keys = signature_of("tuner.optimizers.adamw.adamw").keys
    assert [name for name, kind in keys.items() if kind.run_time] == ["params"]
    assert keys["lr"].text == "a number > 0"


@pytest.mark.parametrize("target", ["tuner.nope.Nope", "tuner.optimizers.adamw.torch", "os.system"])
def test_only_what_our_modules_define_has_a_signature(target: str) -> None:
    with pytest.raises(LookupError):
        signature_of(target)
