"""Where chat templates run: Jinja's immutable sandbox, with what a rendering may take of time and memory counted.

Templates come with weights from anywhere, and the sandbox keeps them from Python but not from `'a' * 10**10` or from a
loop in a loop in a loop. So, in the code that Jinja makes of a template, each pass of a loop and each call counts as a
step, and each text and list that is made counts with its size, before it is made where the size can be told. What is
refused so is refused on every machine alike; a limit of processor time is behind it, for work in few steps.

transformers gives templates the same names but for `lipsum` and the filters left out below, which no conversation
needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import BuiltinMethodType, GeneratorType, MethodType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from tuner.tokenizers import bounded_calls, bounded_filters
from tuner.tokenizers.bounded_calls import PRODUCTS, size_of

MAX_STEPS = 2_000_000
"""Passes of loops, calls and items of lists; a conversation takes a few hundred."""

MAX_BYTES = 32 * 2**20
"""Size of all that is made on the way, and `BYTES_OF_INPUT` for each byte of the conversation."""

BYTES_OF_INPUT = 64

MAX_SECONDS = 2.0
"""Of processor time."""

CONTAINER_BYTES = 64

# Named here: a union that stands in an expression is made anew each time
SEQUENCES = (str, list, tuple)
COUNTED = (list, tuple, range)
CONTAINERS = (str, list, tuple, dict)
METHODS = (BuiltinMethodType, MethodType)

CHECK_EVERY = 2048  # steps between two looks at the clock


WEIGHED = "<weighed>"
"""A filter by a name that no template can write, which becomes `Environment.weighed`."""


class TooMuch(TemplateError):
    """A template that does not come to an end within the limits."""


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox that counts; one rendering at a time."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, **settings: Any) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, **settings)
        self.code_generator_class = _CountingCode
        self.bytes_left = self.steps_left = 0  # nothing is worked out while a template is compiled
        self.until_check, self.until_time = CHECK_EVERY, 0.0
        self.given: Any = None
        self.globals = {
            **{name: self.globals[name] for name in ("range", "cycler", "joiner")},
            "namespace": TemplateNamespace,
            "dict": TemplateDict(),
        }
        self.tests = {**self.tests, **{name: self._weighing(self.tests[name]) for name in COMPARING}}
        jinjas, self.filters = {**self.filters, **bounded_filters.OURS}, {}
        for name in FILTERS:
            self.add_filter(name, jinjas[name], bounded_filters.SIZES.get(name))

    def _weighing(self, test: Any) -> Callable[..., bool]:
        """A test that compares, with what it compares weighed."""

        def weighing(value: Any, *others: Any) -> bool:
            for one in (value, *others):
                self.weighed(one)
            return bool(test(value, *others))

        return weighing

    def begin(self, given: Any) -> None:
        """Set the counters for one rendering of what is given; its size is taken once more than `MAX_BYTES` is made."""
        self.bytes_left, self.given = MAX_BYTES, given
        self.steps_left, self.until_check, self.until_time = MAX_STEPS, CHECK_EVERY, 0.0

    # What the generated code calls. It is called for every expression, so what is usual comes first and calls nothing.

    def tick(self, steps: int = 1) -> bool:
        """One step, which is always allowed until all are done."""
        self.until_check -= steps
        if self.until_check <= 0:
            self._check()
        return True

    def _check(self) -> None:
        self.steps_left -= CHECK_EVERY - self.until_check
        self.until_check = CHECK_EVERY
        if self.steps_left < 0:
            raise TooMuch(f"more than {MAX_STEPS:,} steps")
        now = time.thread_time()
        self.until_time = self.until_time or now + MAX_SECONDS
        if now > self.until_time:
            raise TooMuch(f"more than {MAX_SECONDS:g} seconds")

    def take(self, size: int) -> None:
        """Count what is made, or is about to be."""
        self.bytes_left -= size
        if self.bytes_left < 0:
            self._more()
        if size > 65536:
            self.tick(size >> 10)

    def _more(self) -> None:
        """More room, once, for a long conversation."""
        if self.given is not None:
            self.bytes_left += BYTES_OF_INPUT * size_of(self.given)
            self.given = None
        if self.bytes_left < 0:
            raise TooMuch(f"texts of more than {MAX_BYTES // 2**20} MiB")

    def shown(self, value: Any) -> str:
        """A value as it is written out."""
        if type(value) is str:
            return value
        text = str(value)
        self.take(len(text))
        return text

    def added(self, *parts: Any) -> Any:
        """`a + b + c`, of which most are texts."""
        size = 0
        for part in parts:
            if type(part) is not str:
                return self._added_others(parts)
            size += len(part)
        self.bytes_left -= size
        if self.bytes_left < 0:
            self._more()
        return "".join(parts)

    def _added_others(self, parts: Sequence[Any]) -> Any:
        total = parts[0]
        for part in parts[1:]:
            if isinstance(part, SEQUENCES) or isinstance(total, SEQUENCES):
                self.take(size_of(total) + size_of(part))
            total = total + part
        return total

    def joined(self, parts: Iterable[str]) -> str:
        """Texts as one."""
        parts = list(parts)
        self.take(4 * sum(map(len, parts)))
        return "".join(parts)

    def concat(self, parts: Iterable[str]) -> str:
        return self.joined(parts)

    def strung(self, *parts: Any) -> str:
        """`a ~ b`."""
        return self.joined([self.shown(part) for part in parts])

    def made(self, container: Any) -> Any:
        """A list, tuple or dict that the template wrote down; what is in it counts as often as it is there."""
        self.take(CONTAINER_BYTES + size_of(container, self.bytes_left))
        return container

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`."""
        found = value[start:stop:step]
        self.take(len(found) * (1 if isinstance(found, str) else 8) if hasattr(found, "__len__") else 1)
        return found

    def weighed(self, value: Any) -> Any:
        """What is compared: with much of it, it takes more than a step."""
        if type(value) is str:
            if len(value) > 1024:
                self.tick(len(value) >> 10)
        elif isinstance(value, COUNTED):
            self.tick(len(value) >> 4)
        return value

    # What the sandbox asks

    def getattr(self, obj: Any, attribute: str) -> Any:
        # What is usual and known to be safe, without the sandbox's questions
        kind = type(obj)
        if kind is dict:
            if attribute in obj and attribute not in DICT_METHODS:
                return obj[attribute]
        elif attribute in QUICK.get(kind, ()):
            return getattr(obj, attribute)
        if attribute.startswith("__"):
            return self.unsafe_undefined(obj, attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, names in ATTRIBUTES.items():
            if isinstance(obj, kind):
                return attr in names
        return not isinstance(obj, bytes | bytearray | type | GeneratorType)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuse at once: Jinja's own would be written out as nothing."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is None:
            return None
        return bounded_calls.formatting(value, _Formatter(self), self.take)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.take(bounded_calls.size_of_operation(operator, left, right))
        return self.binop_table[operator](left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.tick()
        if isinstance(__obj, Macro):
            if __obj.catch_varargs or __obj.catch_kwargs:
                __self.take(size_of((args, kwargs), __self.bytes_left))
            return __context.call(__obj, *args, **kwargs)
        if isinstance(__obj, METHODS) and isinstance(__obj.__self__, CONTAINERS):
            if __obj.__name__ in PRODUCTS:
                __self.tick(bounded_calls.steps_of_product(__obj.__self__, args))
            if (size := bounded_calls.size_of_call(__obj.__name__, __obj.__self__, args, kwargs)) is None:
                __self.weighed(__obj.__self__)
            else:
                __self.take(size)
            return __self._counted_result(__context.call(__obj, *args, **kwargs))
        for arg in args:
            __self.weighed(arg)
        result = super().call(__context, __obj, *args, **kwargs)
        return __self._counted_result(result)

    def add_filter(self, name: str, filter_: Callable[..., Any], size: Callable[..., int] | None = None) -> None:
        """Let templates call a filter; its steps and results count.

        Args:
            name: what they call it.
            filter_: as Jinja wants it.
            size: bytes of its result at most, for the same arguments.
        """

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            self.weighed(args[at])
            if multiplies:
                self.tick(bounded_calls.steps_of_product(args[at], args[at + 1 :]))
            if size is not None:
                self.take(size(*args, **kwargs))
            return self._counted_result(filter_(*args, **kwargs))

        first = getattr(filter_, "jinja_pass_arg", None)  # it gets the environment or the context before the value
        at, multiplies = 0 if first is None else 1, name in PRODUCTS
        if first is not None:
            counted.jinja_pass_arg = first  # type: ignore[attr-defined]
        self.filters[name] = counted

    def _counted_result(self, result: Any) -> Any:
        if isinstance(result, str):
            self.bytes_left -= len(result)
            if self.bytes_left < 0 or len(result) > 65536:
                self.take(len(result))
        elif isinstance(result, CONTAINERS):
            self.take(size_of(result, self.bytes_left))
        elif isinstance(result, Iterator):
            return self._counted_items(result)
        return result

    def _counted_items(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.tick()
            yield item


class _CountingCode(CodeGenerator):
    """Python code of a template with the counting in it."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        step = nodes.EnvironmentAttribute("tick()", lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(step, node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        parts: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            parts.append(left.right)
            left = left.left
        self._call("added", [left, *reversed(parts)], frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._call("strung", node.nodes, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._made(super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "store":
            super().visit_Tuple(node, frame)
        else:
            self._made(super().visit_Tuple, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._made(super().visit_Dict, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        self._call("sliced", [node.node, *(bound or nodes.Const(None) for bound in bounds)], frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        if sum(not isinstance(operand, nodes.Const) for operand in operands) > 1 or node.ops[0].op in ("in", "notin"):
            node.expr = _weighed(node.expr)
            for operand in node.ops:
                operand.expr = _weighed(operand.expr)
        super().visit_Compare(node, frame)

    def visit_Filter(self, node: nodes.Filter, frame: Frame) -> None:
        if node.name == WEIGHED and node.node is not None:
            self._call("weighed", [node.node], frame)
        else:
            super().visit_Filter(node, frame)

    def _made(self, visit: Any, node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")

    def _call(self, name: str, parts: Sequence[nodes.Expr], frame: Frame) -> None:
        """`environment.<name>(...)`."""
        self.write(f"environment.{name}(")
        for number, part in enumerate(parts):
            self.write(", " if number else "")
            self.visit(part, frame)
        self.write(")")

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        # What is added or called was counted as it was made
        self.write(
            "str(" if isinstance(node, nodes.Add | nodes.Concat | nodes.Call | nodes.Filter) else "environment.shown("
        )


def _weighed(operand: nodes.Expr) -> nodes.Expr:
    """What is compared, which `visit_Filter` writes as a call that weighs it."""
    if isinstance(operand, nodes.Const):
        return operand
    return nodes.Filter(operand, WEIGHED, [], [], None, None, lineno=operand.lineno)


class _Formatter(SandboxedFormatter):
    """`'{}'.format(...)` without paddings that fill the memory."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        bounded_calls.require_narrow(format_spec)
        return super().format_field(value, format_spec)


class TemplateDict:
    """`dict(...)`, which gives no hold on the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """`namespace(...)` without names that begin with an underscore; what it holds is not written out with it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        given = dict(*args, **kwargs)
        for name in given:
            _require_public(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no {name!r}: names with an underscore in front are Python's")


FILTERS = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "float",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "sum",
    "title",
    "trim",
    "truncate",
    "unique",
    "upper",
    "wordcount",
]
"""Those of Jinja that templates may call; `tojson` comes from `chat_template`."""

COMPARING = "== eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le in".split()  # noqa: SIM905
"""Tests, as in `x is eq(y)`, that look at all of both."""

DICT_METHODS = frozenset(dir(dict))

ATTRIBUTES: Mapping[type, frozenset[str]] = {
    str: frozenset(
        [
            "capitalize",
            "casefold",
            "center",
            "count",
            "endswith",
            "expandtabs",
            "find",
            "format",
            "format_map",
            "index",
            "isalnum",
            "isalpha",
            "isascii",
            "isdecimal",
            "isdigit",
            "isidentifier",
            "islower",
            "isnumeric",
            "isprintable",
            "isspace",
            "istitle",
            "isupper",
            "join",
            "ljust",
            "lower",
            "lstrip",
            "partition",
            "removeprefix",
            "removesuffix",
            "replace",
            "rfind",
            "rindex",
            "rjust",
            "rpartition",
            "rsplit",
            "rstrip",
            "split",
            "splitlines",
            "startswith",
            "strip",
            "swapcase",
            "title",
            "upper",
            "zfill",
        ]
    ),
    int: frozenset(),
    float: frozenset({"is_integer"}),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    range: frozenset({"count", "index", "start", "step", "stop"}),
}
"""What may be read of Python's own values; of others, as loops and macros, what Jinja's sandbox allows."""

QUICK: Mapping[type, frozenset[str]] = {
    str: ATTRIBUTES[str] - {"format", "format_map"},
    LoopContext: frozenset(
        {"first", "last", "index", "index0", "length", "previtem", "nextitem", "revindex", "revindex0"}
    ),
}
"""What is read so often that it is not asked of the sandbox, which would allow it."""
