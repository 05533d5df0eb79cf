"""What a person sees, on a terminal (a real one, through pty) and in a file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tuner.logging.disk import Generation
from tuner.logging.terminal import Terminal

METRICS = {
    "tokens": 2048,
    "train/loss": 2.34567,
    "train/lr": 1e-3,
    "train/grad_norm": 1.25,
    "perf/tokens_per_s": 1234.5,
    "memory/peak_mib": 1536.0,
}
SAMPLE = Generation("def [bold]f[/bold](x)", "Return :x: squared.", "\x1b[2JHmm", "Return x squared.")


def _whole_run(out: Path) -> None:
    with Terminal(out) as terminal:
        terminal.header({"model": "smollm2_135m", "trainable": "2,442,240"})
        terminal.step(0, {"val/loss": 3.0})
        terminal.start(total_steps=20, done_steps=18)
        terminal.step(19, METRICS)
        terminal.step(20, METRICS)
        terminal.step(20, {"tokens": 2048, "val/loss": 2.5, "val/perplexity": 12.18})
        terminal.samples([SAMPLE])
        terminal.closing({"adapter": f"{out}/adapter"}, {"try it": f"python -m tuner generate run={out}"})


def test_plain_lines_where_stdout_is_not_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _whole_run(tmp_path)
    text = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text), "no control codes but the newline"
    lines = text.splitlines()
    (first,) = [line for line in lines if line.startswith("step 19/20")]
    for part in ("loss 2.3457", "lr 1.00e-03", "grad norm 1.25", "1,234 tokens/s", "peak 1.50 GiB", "eta 0:00"):
        assert part in first
    assert "step 0  validation loss 3.0000" in lines
    assert "step 20/20  validation loss 2.5000  perplexity 12.180" in lines
    assert any("smollm2_135m" in line for line in lines)
    assert f"  adapter  {tmp_path}/adapter" in lines
    assert f"  try it  python -m tuner generate run={tmp_path}" in lines
    assert (tmp_path / "run.log").read_text() == text


def test_generated_text_is_shown_as_it_is_and_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _whole_run(tmp_path)
    text = capsys.readouterr().out
    assert "def [bold]f[/bold](x)" in text, "brackets are no markup"
    assert "Return :x: squared." in text, "colons are no emoji"
    assert "\\x1b[2JHmm" in text
    header = next(line for line in text.splitlines() if "true reply" in line)
    assert re.findall(r"prompt|true reply|before|after", header) == ["prompt", "true reply", "before", "after"]


def test_a_live_bar_on_a_terminal_and_plain_text_in_the_log(tmp_path: Path) -> None:
    import pty

    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path\n"
        f"from test_terminal import _whole_run; _whole_run(Path({str(tmp_path)!r}))"
    )
    reader, writer = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=writer, env=environment)
    os.close(writer)
    screen = b""
    try:
        while chunk := os.read(reader, 65536):
            screen += chunk
    except OSError:
        pass  # how Linux says that the other end is closed
    assert process.wait(timeout=30) == 0
    text = screen.decode()
    assert "\x1b[?25l" in text, "the bar hides the cursor"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "and gives it back"
    assert "20/20" in text
    assert "loss 2.3457" in text
    log = (tmp_path / "run.log").read_text()
    assert "\x1b" not in log
    assert re.findall(r"^step (\d+)/20", log, re.MULTILINE) == ["19", "20", "20"]


def test_a_broken_run_leaves_no_hook_behind_and_closing_twice_is_harmless(tmp_path: Path) -> None:
    before = warnings.showwarning
    terminal = Terminal(tmp_path)
    assert warnings.showwarning is not before
    with pytest.raises(ZeroDivisionError), terminal:
        terminal.step(1 // 0, METRICS)
    terminal.close()
    assert warnings.showwarning is before


def test_warnings_are_one_line_while_it_is_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        with Terminal(tmp_path):
            warnings.warn("the store is away", RuntimeWarning, stacklevel=1)
        assert warnings.showwarning is before
    assert capsys.readouterr().out == "warning: the store is away\n"
    assert (tmp_path / "run.log").read_text() == "warning: the store is away\n"


def test_a_resumed_run_appends_to_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("first", "second"):
        with Terminal(tmp_path) as terminal:
            terminal.say(word)
    assert (tmp_path / "run.log").read_text() == "first\nsecond\n"


def test_a_character_the_encoding_lacks_does_not_end_the_run(tmp_path: Path) -> None:
    script = (
        f"from pathlib import Path\nfrom tuner.logging.terminal import Terminal\n"
        f"with Terminal(Path({str(tmp_path)!r})) as terminal: terminal.say('caf\\u00e9')"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=True)
    assert done.stdout == b"caf?\n"
    assert (tmp_path / "run.log").read_text(encoding="utf-8") == "café\n"
