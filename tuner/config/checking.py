"""Every key against the signature that reads it, every rule across groups: all problems in one pass."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuner.config.facts import facts_of
from tuner.config.kinds import MISSING, Kind
from tuner.config.rules import broken_rules
from tuner.config.signatures import Signature, definitions, signature_of
from tuner.config.torchtune.words import sentence_for
from tuner.errors import ConfigError, nearest

COMPONENTS = (
    "models",
    "peft",
    "quantization",
    "precision",
    "memory",
    "optimizers",
    "schedules",
    "distributed",
    "data",
    "tokenizers",
    "checkpoint",
    "logging",
)
"""The packages of `tuner` whose classes and functions a configuration may build."""

LIBRARY_CLASS = re.compile(r"(torch|bitsandbytes)\.optim\.[A-Z]\w*")
"""Classes of libraries that may be built. One name deep: `torch.optim.<module>.os.system` would be a way out."""

INSTRUCTIONS = {"_target_": str, "_partial_": bool, "_recursive_": bool, "_convert_": str}
"""Keys that are read by Hydra's `instantiate` and not by the target."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration; `rule` is the broken rule, None where a key or value is wrong."""

    sentence: str
    rule: str | None = None


def problems_of(config: Mapping[str, Any], command: str = "Run") -> list[Problem]:
    """Everything wrong with a configuration of plain resolved containers.

    Args:
        config: without Hydra's own node.
        command: the class of `tuner.settings` that names its keys.
    """
    trusted = config.get("trust_targets", [])
    targets = list(refused_targets(config, trusted if isinstance(trusted, list) else []))
    refused = {path for path, _ in targets}
    keys = list(_keys("", config, signature_of(f"tuner.settings.{command}"), refused))
    problems = [Problem(sentence) for _, sentence in [*targets, *keys]]
    return problems + _broken(config, {path for path, _ in [*targets, *keys]})


def member_problems(path: str, node: Mapping[str, Any], target: str) -> list[str]:
    """Everything wrong with the keys of a node that is not part of a run: Hydra's launcher and sweeper.

    Args:
        path: of the node.
        node: plain resolved containers.
        target: the class of ours whose signature names its keys.
    """
    return [sentence for _, sentence in _keys(path, node, signature_of(target), set())]


def refused_targets(node: Any, trusted: Sequence[str], path: str = "") -> Iterator[tuple[str, str]]:
    """Path and problem of every `_target_`, at any depth, that may not be built."""
    if isinstance(node, Mapping):
        if "_target_" in node and (reason := _refusal(node["_target_"], trusted)):
            yield path, f"{_join(path, '_target_')}={shown(node['_target_'])}: {reason}"
        children: list[tuple[Any, Any]] = list(node.items())
    else:
        children = list(enumerate(node)) if isinstance(node, list) else []
    for key, child in children:
        yield from refused_targets(child, trusted, _join(path, key))


def _refusal(target: Any, trusted: Sequence[str]) -> str | None:
    """Why a target may not be built, None where it may."""
    if target == MISSING:
        return "needs a value, the dotted name of a class, as torch.optim.RAdam"
    if not isinstance(target, str):
        return "expected the dotted name of a class"
    if any(target.startswith(f"{prefix.rstrip('.')}.") for prefix in trusted if isinstance(prefix, str) and prefix):
        return None
    root, *rest = target.split(".")
    if root != "tuner":
        is_optimizer = LIBRARY_CLASS.fullmatch(target)
        return (
            None
            if is_optimizer
            else (
                "not among the classes a configuration may build; valid: tuner's own, torch.optim.<Class>, "
                "bitsandbytes.optim.<Class>, and what starts with an entry of trust_targets"
            )
        )
    if not rest or rest[0] not in COMPONENTS:
        return f"not in a package of components; {nearest(rest[0] if rest else '', COMPONENTS)}"
    module, _, name = target.rpartition(".")
    try:
        defined = definitions(module)
    except LookupError:
        return f"no such module as {module}"
    return None if name in defined else f"{module} does not define it; {nearest(name, defined)}"


def _keys(path: str, node: Mapping[str, Any], signature: Signature, refused: set[str]) -> Iterator[tuple[str, str]]:
    """Path and problem of every key of `node` that is unknown, absent or of a wrong kind."""
    is_member = "_target_" in node
    given = {key: value for key, value in node.items() if not (is_member and key in INSTRUCTIONS)}
    known = {key: kind for key, kind in signature.keys.items() if not kind.run_time}
    for key in () if signature.is_open else [key for key in given if key not in known]:
        word = f"{_join(path, key)}={shown(given[key])}"
        yield _join(path, key), sentence_for(word) or f"{word}: no such key; {nearest(str(key), known)}"
    for key, kind in known.items():
        if key not in given:
            yield _join(path, key), f"{_join(path, key)}: missing; expected {kind.text}"
        else:
            yield from _value(_join(path, key), given[key], kind, refused)
    for key, expected in INSTRUCTIONS.items() if is_member else ():
        if key in node and not isinstance(node[key], expected):
            yield _join(path, key), f"{_join(path, key)}={shown(node[key])}: expected a {expected.__name__}"


def _value(path: str, value: Any, kind: Kind, refused: set[str]) -> Iterator[tuple[str, str]]:
    if value == MISSING:
        yield path, f"{path}: needs a value, as {path}=...; expected {kind.text}"
    elif not kind.accepts(value):
        yield path, f"{path}={shown(value)}: expected {kind.text}"
    elif kind.record:
        yield from _keys(path, value, signature_of(".".join(kind.record)), refused)
    elif kind.members:
        for name, child in value.items():
            yield from _member(_join(path, name), child, refused)
    elif kind.member and value is not None:
        yield from _member(path, value, refused)


def _member(path: str, node: Mapping[str, Any], refused: set[str]) -> Iterator[tuple[str, str]]:
    """A library's class is checked where it is built: its signature is only known once it is imported."""
    if path in refused:
        return
    if node["_target_"].startswith("tuner."):
        yield from _keys(path, node, signature_of(node["_target_"]), refused)
    elif path == "optimizer":  # what makes groups of parameters is ours whichever class steps them
        for key, kind in signature_of("tuner.optimizers.groups.groups").keys.items():
            if key in node and not kind.run_time:
                yield from _value(_join(path, key), node[key], kind, refused)


def _broken(config: Mapping[str, Any], wrong: set[str]) -> list[Problem]:
    """The rules that are broken by values which are right in themselves."""
    try:
        return [Problem(sentence, rule.name) for rule, sentence in broken_rules(facts_of(config, wrong))]
    except ConfigError as error:
        return [Problem(sentence) for sentence in error.problems]


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def shown(value: Any) -> str:
    """A value as it would be written on the command line, long ones cut."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
