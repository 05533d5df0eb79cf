"""What holds for every test: no network, no file outside its own folder, no GPU test without a GPU."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

import tuner

CHECKOUT = Path(tuner.__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Before the first import of torch or huggingface_hub, which read these once; subprocesses inherit them."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # What an earlier session has converted or prepared would hide what this one does not do.
    cache = tempfile.TemporaryDirectory(prefix="tuner-test-cache-")
    config.add_cleanup(cache.cleanup)
    os.environ["TUNER_CACHE"] = cache.name
    # The tests' tensors are small: on a machine of many cores more threads only wait for each other.
    # Threads that spin while they wait take the processor from other tests' processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    processes = len(getattr(config.option, "tx", None) or ["this one"])  # xdist's workers, which inherit the number
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, os.cpu_count() or 1) // processes)))
    # Tests that a shell starts in the background ignore Ctrl-C, and so would the commands that they stop by it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if "gpu" in item.keywords]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _own_folder_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in a folder of its own; a command it starts from there finds the package, and no one's MLflow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
