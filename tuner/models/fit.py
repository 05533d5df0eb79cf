"""Whether tensors are the ones that a configuration asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from tuner.errors import ModelError


def require_fit(said: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Hold the shapes that a configuration asks for against those that are there.

    Raises:
        ModelError: `said` and every tensor that is missing, unexpected or of another shape.
    """
    problems = [("missing {}" + f" {list(wanted[name])}", name) for name in wanted.keys() - found.keys()]
    problems += [("unexpected {}" + f" {list(found[name])}", name) for name in found.keys() - wanted.keys()]
    problems += [
        ("{}" + f" is {list(found[name])} and should be {list(wanted[name])}", name)
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    if problems:
        raise ModelError(f"{said}: {'; '.join(_of_all_layers(problems))}")


def _of_all_layers(problems: Iterable[tuple[str, str]]) -> list[str]:
    """Sentences about tensors; those that differ in the layer alone are said once, as of `model.layers.0-31.<name>`."""
    layers: dict[tuple[str, str], list[int]] = {}
    for sentence, name in problems:
        numbered = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        layers.setdefault((sentence, numbered[2] if numbered else name), []).extend(
            [int(numbered[1])] if numbered else []
        )
    return sorted(
        sentence.format(f"model.layers.{_ranges(sorted(indices))}.{name}" if indices else name)
        for (sentence, name), indices in layers.items()
    )


def _ranges(indices: Sequence[int]) -> str:
    """`0-3,7` of 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
