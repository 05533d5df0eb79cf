"""The import of bitsandbytes: silent, quick, and without a trace left in anyone else's modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.errors import TunerError
from tuner.quiet import import_bitsandbytes

ROOT = Path(__file__).parents[2]


def run(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120)


@pytest.mark.slow
def test_a_fresh_process_hears_nothing_and_everything_is_put_back(tmp_path: Path) -> None:
    """Even where `kernels` is installed (here one that talks), from which bitsandbytes would fetch code."""
    (tmp_path / "kernels.py").write_text("print('kernels was imported')")
    result = run(
        "import logging, sys, torch\n"
        "compile_before = torch.compile\n"
        "from tuner.quiet import import_bitsandbytes\n"
        "module = import_bitsandbytes()\n"
        "assert module is sys.modules['bitsandbytes'] is import_bitsandbytes()\n"
        "assert torch.compile is compile_before\n"
        "assert 'kernels' not in sys.modules\n"
        "assert logging.getLogger('bitsandbytes.backends.cpu.ops').level == logging.NOTSET\n"
        "print('torch._inductor' in sys.modules)\n"
        "import kernels\n",
        tmp_path,
    )
    assert result.stdout == "False\nkernels was imported\n"
    assert result.stderr == ""


@pytest.mark.slow
def test_importing_the_components_imports_no_bitsandbytes() -> None:
    result = run(
        "import sys, tuner.quantization.nf4, tuner.optimizers.paged_adamw8bit, tuner.optimizers.custom\n"
        "print('bitsandbytes' in sys.modules)\n"
    )
    assert result.stdout == "False\n"


def test_a_missing_library_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what makes an import fail as if it were not installed
    with pytest.raises(TunerError, match=r"bitsandbytes is not installed, .*: pip install bitsandbytes"):
        import_bitsandbytes()
