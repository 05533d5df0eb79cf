"""Jinja's filters that can make much out of little: how much, and two that are done here in bounded steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import pass_environment, pass_eval_context
from jinja2.environment import Environment
from jinja2.filters import do_sum, make_attrgetter, sync_do_join
from jinja2.nodes import EvalContext

from tuner.tokenizers.bounded_calls import TooLarge, size_of, size_of_percent, width_of

MAX_DIGITS = 100
"""Of `round`."""


@pass_eval_context
def join(context: EvalContext, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's `join`, whose size is told before the text is made."""
    items = list(value)
    if attribute is not None:
        items = list(map(make_attrgetter(context.environment, attribute), items))
    context.environment.take(4 * sum(map(size_of, items)) + size_of(d) * len(items))  # type: ignore[attr-defined]
    return sync_do_join(context, items, d)


@pass_environment
def sum_of_numbers(
    environment: Environment, iterable: Iterable[Any], attribute: str | int | None = None, start: float = 0
) -> Any:
    """Jinja's `sum`, of numbers alone: lists would be copied once for each."""
    if not isinstance(start, int | float):
        raise TooLarge(f"sum from {start!r}: only numbers are summed")
    return do_sum(environment, iterable, attribute, start)


OURS: Mapping[str, Callable[..., Any]] = {"join": join, "sum": sum_of_numbers}


def _center(value: Any, width: int = 80) -> int:
    return size_of(value) + 4 * width_of(width)


def _indent(s: Any, width: int | str = 4, *_: Any, **__: Any) -> int:
    each = size_of(width) if isinstance(width, str) else width_of(width)
    return size_of(s) + (len(s.splitlines()) + 1 if isinstance(s, str) else 1) * each


def _replace(context: Any, s: Any, old: Any, new: Any, count: int | None = None) -> int:
    text = s if isinstance(s, str) else str(s)
    return size_of(text) + text.count(str(old)) * size_of(new)


def _format(value: Any, *args: Any, **kwargs: Any) -> int:
    return size_of_percent(str(value), kwargs or args)


def _batch(value: Any, linecount: int, fill_with: Any = None) -> int:
    return 8 * width_of(linecount)


def _round(value: Any, precision: int = 0, method: str = "common") -> int:
    if isinstance(precision, int) and abs(precision) > MAX_DIGITS:
        raise TooLarge(f"round to {precision} digits")
    return 8


def _truncate(environment: Any, s: Any, length: int = 255, killwords: bool = False, end: str = "...", *_: Any) -> int:
    return size_of(s) + size_of(end)


def _all_of(*args: Any, **kwargs: Any) -> int:
    """What goes through all that there is, often several times."""
    return sum(size_of(value) for value in args[:2])


def _spelt(*args: Any, **kwargs: Any) -> int:
    """What may write each character with six."""
    return 6 * _all_of(*args)


SIZES: Mapping[str, Callable[..., int]] = {
    "center": _center,
    "indent": _indent,
    "replace": _replace,
    "format": _format,
    "batch": _batch,
    "slice": _batch,
    "round": _round,
    "truncate": _truncate,
    **dict.fromkeys(("e", "escape", "string", "title", "capitalize"), _spelt),
    **dict.fromkeys(("dictsort", "groupby", "int", "float", "max", "min", "sort", "unique", "wordcount"), _all_of),
}
"""Bytes of the results at most, by the filters' names; the others make no more than there is."""
