"""What every member of the logger group does. A new logger is found here by its YAML."""

from __future__ import annotations

import ast
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from tuner.config import compose, conf_dir
from tuner.errors import TunerError
from tuner.logging.background import BackgroundLogger
from tuner.logging.many import ManyLogger
from tuner.types import Logger, RunInfo

MEMBERS = sorted(path.stem for path in (conf_dir() / "logger").glob("*.yaml"))
OFFLINE = {"wandb": ["logger.mode=offline"]}
SUMMARY = {"status": "finished", "val_loss": 1.5, "steps": 2}


def test_all_members_are_found() -> None:
    assert set(MEMBERS) >= {"none", "mlflow", "tensorboard", "wandb", "many"}


@pytest.fixture(params=MEMBERS)
def logger(request: pytest.FixtureRequest, store: str, monkeypatch: pytest.MonkeyPatch) -> Logger:
    """The member as the configuration builds it, its store in the test's own folder."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    config = compose([f"logger={request.param}", *OFFLINE.get(request.param, [])])
    built: Logger = instantiate(config.logger, _convert_="all")
    return built


def _parts(logger: Any) -> Iterator[Any]:
    yield from logger.loggers.values() if isinstance(logger, ManyLogger) else (logger,)


def _log(logger: Logger, info: RunInfo) -> dict[str, Any]:
    info.out.mkdir()
    logger.start(info)
    logger.log(1, {"tokens": 8, "train/loss": 2.0})
    logger.log(2, {"tokens": 16, "train/loss": float("nan")})
    logger.log(2, {"tokens": 16, "val/loss": 1.5, "val/perplexity": 4.48})
    (info.out / "samples.json").write_text("[]")
    logger.artifact(info.out / "samples.json")
    return logger.close("finished", SUMMARY)


def test_start_log_close_in_order(
    logger: Logger, run_info: Callable[..., RunInfo], capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        facts = _log(logger, run_info())
    assert json.loads(json.dumps(facts)) == facts
    assert capfd.readouterr() == ("", ""), "the terminal belongs to the run"


def test_each_backend_got_what_was_logged(logger: Logger, run_info: Callable[..., RunInfo]) -> None:
    _log(logger, run_info())
    for part in _parts(logger):
        if isinstance(part, BackgroundLogger):
            assert part._delivered


def test_out_of_order_is_a_bug_and_says_so(logger: Logger) -> None:
    for part in _parts(logger):
        if isinstance(part, BackgroundLogger):
            for call in (lambda p=part: p.log(1, {}), lambda p=part: p.close("finished", {})):
                with pytest.raises(RuntimeError, match="start comes before"):
                    call()


def test_survives_the_absence_of_its_backend(
    logger: Logger, run_info: Callable[..., RunInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: object, run: RunInfo) -> dict[str, Any]:
        raise ConnectionRefusedError("nobody there")

    parts = [part for part in _parts(logger) if isinstance(part, BackgroundLogger)]
    for part in parts:
        monkeypatch.setattr(type(part), "open", away)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        began = time.perf_counter()
        assert _log(logger, run_info()) == {}
        assert time.perf_counter() - began < 5
    said = [str(entry.message) for entry in caught if entry.category is RuntimeWarning]
    assert len(said) == len(parts), "each backend is said once"
    assert all("nobody there" in line and "the run goes on" in line and "{out}" not in line for line in said)


@pytest.mark.parametrize("member", MEMBERS)
def test_building_loads_no_backend(member: str) -> None:
    """The terminal, `check` and `--cfg job` stay fast: a logger's library is loaded behind the training steps."""
    folder = Path(__file__).parents[2] / "tuner" / "logging"
    for path in (folder / f"{member}.py", folder / "mlflow_run.py", folder / "mlflow_store.py"):
        imported = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert not {name for name in imported if name.split(".")[0] in {"mlflow", "wandb", "tensorboard", "torch"}}


@pytest.mark.parametrize("member", ["tensorboard", "wandb"])
def test_a_missing_extra_is_named_when_the_logger_is_built(member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.logging.extras.find_spec", lambda name: None)
    with pytest.raises(Exception, match=rf"pip install 'tuner\[{member}\]'") as error:
        instantiate(compose([f"logger={member}"]).logger, _convert_="all")
    assert isinstance(error.value.__cause__ or error.value, TunerError)


def test_many_builds_its_parts_from_the_group(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    words = ["logger=many", "+logger@logger.loggers.wandb=wandb", "logger.loggers.wandb.mode=offline"]
    config = compose([*words, "logger.loggers.mlflow.experiment=mine", "~logger.loggers.tensorboard"])
    many = instantiate(config.logger, _convert_="all")
    assert [type(part).__name__ for part in many.loggers.values()] == ["MLflowLogger", "WandbLogger"]
    assert many.loggers["mlflow"].experiment == "mine"
