"""Run folders and stores for the loggers' tests."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tuner.logging.mlflow import MLflowLogger
from tuner.logging.mlflow_store import silent
from tuner.types import RunInfo


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def run_info(tmp_path: Path) -> Callable[..., RunInfo]:
    """Makes the `RunInfo` of a run folder `tmp_path/<name>`."""

    def make(name: str = "run", resumed: bool = False, **config: Any) -> RunInfo:
        resolved = {
            "model": {"_target_": "tuner.models.tiny", "path": None},
            "peft": {"lora_rank": 8, "lora_attn_modules": ["q_proj", "v_proj"]},
            "optimizer": {"lr": 1e-3},
            "logger": {"_target_": "tuner.logging.none.NoLogger"},
            **config,
        }
        dataset = {"name": "pydoc", "fingerprint": "0123456789abcdef" * 4, "counts": {"duplicates": 3}}
        return RunInfo(tmp_path / name, resolved, ["peft.lora_rank=8"], dataset, resumed)

    return make


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store without runs; its migrations take seconds, so tests copy it."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    with silent():
        MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def store(fresh_store: Path, tmp_path: Path) -> str:
    """The address of a store of this test's own."""
    shutil.copy(fresh_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def mlflow_logger() -> Callable[..., MLflowLogger]:
    """Makes an `MLflowLogger` with short waits."""

    def make(tracking_uri: str | None, **keys: Any) -> MLflowLogger:
        settings: dict[str, Any] = {
            "experiment": "tuner",
            "run_name": None,
            "tags": {},
            "parent_run_id": None,
            "live": True,
            "system_metrics": False,
            "flush_every_s": 0.1,
            "connect_timeout_s": 1.0,
            "close_timeout_s": 20.0,
        }
        return MLflowLogger(tracking_uri, **{**settings, **keys})

    return make


@pytest.fixture
def closed_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port whose server takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)  # the kernel completes the handshakes; nobody calls accept
        yield int(listener.getsockname()[1])
