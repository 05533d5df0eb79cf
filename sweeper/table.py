"""The answer of a sweep as a person reads it: a table, and what to do next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sweeper.plan import swept_keys
from sweeper.results import Row, best_of
from sweeper.trial import logs_of

WIDTH = 160
"""Of the table where stdout is no terminal."""


def show(rows: Sequence[Row], results: Path, objective: str, switches: Sequence[str]) -> None:
    """Print the comparison, why trials did not finish, and the command of the best one.

    Args:
        rows: in the order to be shown.
        results: where they are written.
        objective: what they are compared by.
        switches: of the command line, as `--config-dir=...`.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=WIDTH, force_terminal=False, color_system=None)
    keys = swept_keys(row.entry.values for row in rows)
    shown = [f"{key.rpartition('.')[2]}" for key in keys]
    table = Table("trial", *shown, title=f"{len(rows)} trials by {objective}", title_justify="left")
    for name in (objective, "val_loss") if objective != "val_loss" else ("val_loss",):
        table.add_column(name, justify="right")
    for name in ("seconds", "peak MiB", "trainable", "status"):
        table.add_column(name, justify="left" if name == "status" else "right")
    for row in rows:
        numbers = row.numbers
        losses = [_number(numbers["objective"], ".4f")]
        losses += [_number(numbers["val_loss"], ".4f")] if objective != "val_loss" else []
        rest = [_number(numbers[name], how) for name, how in (("seconds", ".1f"), ("peak_memory_mib", ".0f"))]
        cells = [row.entry.id, *(row.entry.values.get(key, "") for key in keys), *losses, *rest]
        cells += [_number(numbers["trainable_params"] or None, ",.0f"), row.status]
        table.add_row(*map(Text, cells))
    print()
    console.print(table)
    for row in rows:
        if row.status not in ("finished", "pending", "running"):
            print(f"{row.status}  {row.entry.id}  {row.reason or ''}".rstrip())
            for log in logs_of(row.out):
                print(f"         log {log}")
    print(f"\nresults  {results}")
    best = best_of(rows)
    if best is not None:
        print(f"best     {reproduce(best, switches)}")
    sys.stdout.flush()


def reproduce(row: Row, switches: Sequence[str]) -> str:
    """The command that runs a trial's point again, in a new run folder and to the same bits."""
    import yaml

    words = [*switches, *row.entry.words]
    threads = yaml.safe_load((row.out / "config.yaml").read_text(encoding="utf-8"))["train"]["num_threads"]
    if not any(word.lstrip("+").startswith("train.num_threads=") for word in words):
        words.append(f"train.num_threads={threads}")
    return shlex.join(["python", "-m", "tuner", *words])


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
