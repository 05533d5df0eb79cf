"""How large the results of Python's text methods and Jinja's filters get, told before they are made."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper
from string import Formatter
from typing import Any

from jinja2.exceptions import TemplateError

MAX_WIDTH = 10_000
"""Of paddings, in characters."""

MAX_BITS = 4096
"""Of whole numbers."""

MAX_SIZE = 2**62

LOOKING = ("startswith", "endswith", "find", "rfind", "index", "rindex", "count")
"""Methods of a text that make nothing."""

PRODUCTS = ("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip", "trim")
"""Methods of a text, and a filter, which for each of its characters may look at all of the argument."""

PERCENT = re.compile(r"%(?:\((?:[^()]|\([^()]*\))*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")


class TooLarge(TemplateError):
    """A result that would be too large."""


def size_of(value: Any, most: int = MAX_SIZE) -> int:
    """Bytes of a text, or of a container written out: what it holds twice counts twice.

    Args:
        value: any value of a template.
        most: where to stop counting.
    """
    if isinstance(value, str):
        return len(value) if value.isascii() else 4 * len(value)
    if not isinstance(value, list | tuple | dict):
        return 8
    total, waiting = 0, [value]
    while waiting and total <= most:
        one = waiting.pop()
        total += 8
        if isinstance(one, str):
            total += len(one) if one.isascii() else 4 * len(one)
        elif isinstance(one, list | tuple):
            waiting.extend(one)
        elif isinstance(one, dict):
            waiting.extend(one)
            waiting.extend(one.values())
    return total


def size_of_operation(operator: str, left: Any, right: Any) -> int:
    """Bytes of `left <operator> right` at most.

    Raises:
        TooLarge: a number of more than `MAX_BITS`, or a padding of more than `MAX_WIDTH`.
    """
    if operator == "%":
        return size_of_percent(left, right) if isinstance(left, str) else 8
    if operator == "*" and isinstance(left, int) is not isinstance(right, int):
        times, what = (left, right) if isinstance(left, int) else (right, left)
        return size_of(what) * max(int(times), 0) if isinstance(times, int) else 8
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if operator == "**":
            bits = left.bit_length() * max(right, 0)
        if bits > MAX_BITS:
            raise TooLarge(f"a number of {bits} bits")
    return 8


def size_of_percent(pattern: str, values: Any) -> int:
    total, largest = size_of(pattern), 4 * size_of(values)
    for found in PERCENT.finditer(pattern):
        for width in found.groups():
            if width == "*" or (width and (len(width) > 9 or int(width) > MAX_WIDTH)):
                raise TooLarge(f"{found[0][:40]!r}: a padding of more than {MAX_WIDTH}")
        total += largest + 2 * MAX_WIDTH * bool(found[1] or found[2])
    return total


def require_narrow(spec: str) -> None:
    """Raises TooLarge for a format of more than `MAX_WIDTH`."""
    if any(len(number) > 9 or int(number) > MAX_WIDTH for number in re.findall(r"\d+", spec)):
        raise TooLarge(f"{spec[:40]!r}: a padding of more than {MAX_WIDTH}")


def width_of(width: Any) -> int:
    if isinstance(width, int) and width > MAX_WIDTH:
        raise TooLarge(f"a padding of {width}, more than {MAX_WIDTH}")
    return width if isinstance(width, int) else 0


def size_of_call(name: str, whose: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Bytes that a method of a text or container makes at most; None for one that only looks at it.

    Raises:
        TooLarge: a padding of more than `MAX_WIDTH`.
    """
    if not isinstance(whose, str) or name in LOOKING or name.startswith("is"):
        return None
    if name in ("center", "ljust", "rjust", "zfill"):
        return size_of(whose) + 4 * width_of(args[0] if args else kwargs.get("width"))
    if name == "expandtabs":
        return size_of(whose) + whose.count("\t") * width_of(args[0] if args else kwargs.get("tabsize"))
    if name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        return size_of(whose) + whose.count(args[0]) * size_of(args[1])
    if name == "join" and args:
        parts = args[0] if hasattr(args[0], "__len__") else ()
        return sum(map(size_of, parts)) + len(parts) * size_of(whose)
    if name in ("split", "rsplit", "splitlines", "partition", "rpartition"):
        return 2 * size_of(whose)
    return size_of(whose)


def steps_of_product(whose: Any, args: Sequence[Any]) -> int:
    """Steps that one of `PRODUCTS` takes, besides the one of every call."""
    if not args or not isinstance(args[0], str) or not isinstance(whose, str):
        return 0
    return len(whose) * len(args[0]) >> 10


def formatting(method: Any, formatter: Formatter, take: Callable[[int], None]) -> Callable[..., str]:
    """`'...'.format` or `format_map` of a text, done by `formatter`, its size given to `take` before."""
    text, name = method.__self__, method.__name__

    def formatted(*args: Any, **kwargs: Any) -> str:
        values = args[0] if name == "format_map" and args else kwargs
        take(size_of(text) + text.count("{") * 4 * size_of([list(args), values]))
        return formatter.vformat(text, () if name == "format_map" else args, values)

    return update_wrapper(formatted, method)
