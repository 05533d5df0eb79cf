"""What the person sees, and `run.log`, which holds the same as plain text.

On a terminal the steps are a live bar and everything else scrolls above it. Where stdout is a file or a pipe there is
one plain line a step and no control codes, so that a SLURM log or a CI page stays readable.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from tuner.logging.disk import Generation

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID

LOG = "run.log"
LOG_WIDTH = 120
_SHOWN_CHARACTERS = 600
"""A sample's cell is cut after this many characters; `samples.json` holds the whole text."""


class Terminal:
    """Header, bar, lines, samples and closing block; use it as a context manager, so that the cursor comes back.

    While it is open, Python warnings are shown as one line each (`warning: ...`) above the bar and in the log.

    Args:
        out: the run folder; `run.log` in it is appended to.
    """

    def __init__(self, out: Path) -> None:
        from rich.console import Console

        out.mkdir(parents=True, exist_ok=True)
        _replace_unprintable(sys.stdout)
        self.live = sys.stdout.isatty()
        self._file = (out / LOG).open("a", encoding="utf-8")
        words: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
        plain: dict[str, Any] = {
            "force_terminal": False,
            "force_jupyter": False,
            "color_system": None,
            "legacy_windows": False,
            "width": LOG_WIDTH,
        }
        self._log = Console(file=self._file, **words, **plain)
        self._screen = Console(**words) if self.live else Console(**words, **plain)
        self._bar: tuple[Progress, TaskID] | None = None
        self._total_steps = 0
        self._first_step = 0
        self._started_s = time.monotonic()
        self._showwarning = warnings.showwarning
        warnings.showwarning = self._warn

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def header(self, rows: Mapping[str, str]) -> None:
        """A panel of what is trained: one `name  value` line each."""
        self._print(_panel(rows))

    def start(self, total_steps: int, done_steps: int) -> None:
        """Begin the bar; `done_steps` were done by an earlier process and do not count for the ETA."""
        self._total_steps, self._first_step = total_steps, done_steps
        self._started_s = time.monotonic()
        if self.live:
            progress = _progress(self._screen)
            self._bar = progress, progress.add_task("", total=total_steps, completed=done_steps, numbers="")
            progress.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show logged metrics: training ones move the bar, those of an evaluation are a line of their own."""
        of = f"/{self._total_steps}" if self._total_steps else ""  # before the first step the total is not known
        line = f"step {step}{of}  {_numbers(metrics, _SHOWN)}"
        if any(key.startswith("val/") for key in metrics):
            self.say(line)
        elif self._bar is None:
            self.say(f"{line}  eta {self._eta(step)}")
        else:
            self._log.print(line, soft_wrap=True)
            progress, task = self._bar
            progress.update(task, completed=step, numbers=_numbers(metrics, _ON_THE_BAR))
        self._file.flush()

    def say(self, text: str) -> None:
        """A line above the bar."""
        for console in (self._screen, self._log):
            console.print(printable(text), soft_wrap=True)
        self._file.flush()

    def samples(self, generations: Sequence[Generation]) -> None:
        """Prompt, true reply and what the model wrote before and after, side by side; ends the bar."""
        self.stop()
        self._print(_table(generations))

    def closing(self, saved: Mapping[str, str], commands: Mapping[str, str]) -> None:
        """End of a run: where everything is, and what to do next (`meaning -> command`), one unbroken line each."""
        self.stop()
        for title, rows in (("Saved", saved), ("Next", commands)):
            width = max(map(len, rows), default=0)
            self.say("\n".join([f"\n{title}", *(f"  {name:<{width}}  {value}" for name, value in rows.items())]))

    def stop(self) -> None:
        """End the bar where it stands; lines can still be said."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def close(self) -> None:
        """End the bar and the log; does nothing the second time."""
        self.stop()
        if not self._file.closed:
            warnings.showwarning = self._showwarning
            self._file.close()

    def _print(self, renderable: RenderableType) -> None:
        self._screen.print(renderable)
        self._log.print(renderable)
        self._file.flush()

    def _warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        self.say(f"warning: {message}")

    def _eta(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return "-"
        remaining_s = (time.monotonic() - self._started_s) / done * (self._total_steps - step)
        return _duration(remaining_s)


_SHOWN = {
    "train/loss": ("loss {:.4f}", 1.0),
    "train/lr": ("lr {:.2e}", 1.0),
    "train/grad_norm": ("grad norm {:.3g}", 1.0),
    "perf/tokens_per_s": ("{:,.0f} tokens/s", 1.0),
    "memory/peak_mib": ("peak {:.2f} GiB", 1 / 1024),
    "val/loss": ("validation loss {:.4f}", 1.0),
    "val/perplexity": ("perplexity {:.3f}", 1.0),
}
"""Metrics worth a place on the line, in words, and what to multiply them by."""

_ON_THE_BAR = ("train/loss", "perf/tokens_per_s", "memory/peak_mib")
"""What fits beside a bar in 80 columns."""


def printable(text: str) -> str:
    """`text` with control characters spelled out: a model can generate the codes that clear a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def _numbers(metrics: Mapping[str, float], names: Iterable[str]) -> str:
    shown = {name: _SHOWN[name] for name in names if name in metrics}
    return "  ".join(words.format(metrics[name] * factor) for name, (words, factor) in shown.items())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _panel(rows: Mapping[str, str]) -> RenderableType:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(Text(name, style="bold"), Text(printable(value), overflow="fold"))
    return Panel(grid, title="tuner", title_align="left", expand=False)


def _table(generations: Sequence[Generation]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table("prompt", "true reply", "before", "after", show_lines=True, expand=True)
    for column in table.columns:
        column.ratio = 1
    for one in generations:
        cells = [printable(text.strip()) for text in (one.prompt, one.reply, one.before, one.after)]
        shown = [cell if len(cell) <= _SHOWN_CHARACTERS else f"{cell[:_SHOWN_CHARACTERS]} ..." for cell in cells]
        table.add_row(*(Text(cell, overflow="fold") for cell in shown))
    return table


def _progress(console: Any) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=console,
    )


def _replace_unprintable(stream: TextIO) -> None:
    """Let a character that the terminal's encoding lacks become `?` and not an error in the middle of a run."""
    reconfigure = getattr(stream, "reconfigure", None)  # absent on the streams of notebooks and tests
    if reconfigure is not None:
        reconfigure(errors="replace")
