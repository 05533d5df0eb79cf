"""The standard library's own documentation as training data: signature -> first paragraph of the docstring.

It ships with every Python, so a first run needs no download. The sources are read with `ast` and never imported:
importing runs them, leaves out what the platform lacks, and puts object addresses, different in every process, into
signatures. Names alone would leak: methods that override each other share their docstrings, so the same answer would
occur on both sides of a split by name (for about 30 % of the validation set). The docstring is the key instead.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tuner.data.dataset import Example, Preparation
from tuner.errors import DataError
from tuner.types import Message

PROMPT = "Say in one paragraph what this Python {kind} does:\n\n{signature}"

_SKIPPED_FOLDERS = {
    "dist-packages",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_DOCSTRING_CHARS = range(20, 401)
_SIGNATURE_CHARS = range(1, 301)

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class PyDoc(Preparation):
    """About 4,600 short pairs."""

    def examples(self) -> Documentation:
        return Documentation()


class Documentation:
    """See `tuner.data.dataset.Examples`."""

    name = "pydoc"
    bad_rows = ()

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    @cached_property
    def _examples(self) -> list[Example]:
        return read_examples(_library())

    def content_digest(self) -> str:
        """Of Python's version and of the names, sizes and times of its sources: reading them all takes a second."""
        found = [(file, file.stat()) for file in _source_files(_library())]
        facts = [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found]
        return hashlib.sha256(repr((sys.version, facts)).encode()).hexdigest()


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def read_examples(library: Path) -> list[Example]:
    """All pairs of public names found below `library`, in the order of file and line.

    Raises:
        DataError: if there are no Python sources, or one of them cannot be parsed.
    """
    examples: list[Example] = []
    with _collector_paused():
        for file in _source_files(library):
            relative = file.relative_to(library)
            for signature, docstring, node in _documented(_parse(file), _module_name(relative)):
                paragraph = _first_paragraph(docstring)
                if len(paragraph) in _DOCSTRING_CHARS and len(signature) in _SIGNATURE_CHARS:
                    examples.append(_example(signature, paragraph, node, f"{relative.as_posix()}:{node.lineno}"))
    if not examples:
        raise DataError(f"{library}: no documented Python sources here, where the standard library should be")
    return examples


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the cycle collector, which walks every living syntax tree again and again: a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _source_files(library: Path) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(library):
        folders[:] = [
            name for name in folders if name not in _SKIPPED_FOLDERS and name.isidentifier() and _public(name)
        ]
        found += [Path(folder, name) for name in files if name.endswith(".py") and _public(name)]
    return sorted(found, key=lambda file: file.relative_to(library).as_posix())


def _public(name: str) -> bool:
    return not name.startswith("_") or name == "__init__.py"


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _parse(file: Path) -> ast.Module:
    source = file.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return ast.Module(body=[], type_ignores=[])  # parsing is what takes the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
            return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise DataError(f"{file}:{getattr(error, 'lineno', 1)}: cannot be parsed: {error}") from error


def _documented(parent: ast.AST, qualified_name: str) -> Iterator[tuple[str, str, _Definition]]:
    """Signature and docstring of every public class, function and method; not of functions inside functions."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, _Definition):
            if not _public(node.name):
                continue
            name = f"{qualified_name}.{node.name}"
            docstring = ast.get_docstring(node)
            if docstring:
                yield _signature(node, name), docstring, node
            if isinstance(node, ast.ClassDef):
                yield from _documented(node, name)
        elif isinstance(node, (ast.If, ast.Try, ast.ExceptHandler, ast.With)):
            yield from _documented(node, qualified_name)


def _signature(node: _Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        inherits = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        return f"class {name}({inherits})" if inherits else f"class {name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return " ".join(f"{keyword} {name}({ast.unparse(node.args)}){returns}".split())


def _first_paragraph(docstring: str) -> str:
    return " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())


def _example(signature: str, paragraph: str, node: _Definition, origin: str) -> Example:
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    messages: list[Message] = [
        {"role": "user", "content": PROMPT.format(kind=kind, signature=signature)},
        {"role": "assistant", "content": paragraph},
    ]
    return Example(messages, key=normalised(paragraph), origin=origin)


def normalised(docstring: str) -> str:
    """The docstring's words alone, so that case and punctuation make no second answer of it."""
    return " ".join(re.findall(r"\w+", docstring.casefold()))
