"""MLflow holds what the run folder holds, whatever happens to the store meanwhile."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from tuner.config import conf_dir
from tuner.errors import TunerError
from tuner.logging.disk import DiskLogger, Generation, read_metrics
from tuner.logging.heartbeat import HEARTBEAT, Beat
from tuner.logging.mlflow import MLflowLogger
from tuner.logging.mlflow_run import MlflowRecord, params_of, sanitise
from tuner.logging.mlflow_store import silent
from tuner.logging.process import machine_id, process_start
from tuner.types import RunInfo, Summary
from tuner.verbs.sync import sync

MakeInfo = Callable[..., RunInfo]
MakeLogger = Callable[..., MLflowLogger]
SUMMARY = {"status": "finished", "val_loss": 1.5, "objective": 1.5, "steps": 20, "tokens": 2000, "reason": None}


def _rows(first: int = 1, last: int = 20) -> Iterator[tuple[int, dict[str, float]]]:
    for step in range(first, last + 1):
        yield step, {"tokens": step * 100, "train/loss": 3 / step, "train/lr": 1e-3 / 7, "train/grad_norm": math.pi}
        if step % 10 == 0:
            yield step, {"tokens": step * 100, "val/loss": 2 / step, "val/perplexity": math.exp(2 / step)}


def _train(
    info: RunInfo, logger: Any, rows: Iterator[tuple[int, dict[str, float]]] | None = None, status: str = "finished"
) -> dict[str, Any]:
    """What the assembly does with its loggers; returns the facts."""
    disk = DiskLogger(info.out)
    disk.start(info)
    logger.start(info)
    for step, metrics in rows or _rows():
        disk.log(step, metrics)
        logger.log(step, metrics)
    adapter = info.out / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text('{"r": 8}')
    logger.artifact(adapter)
    logger.artifact(disk.samples([Generation("p", "r", "b", "a")]))
    facts: dict[str, Any] = logger.close(status, {**SUMMARY, "status": status})
    disk.close(status, {**SUMMARY, **facts})
    return facts


def _runs(store: str) -> list[Run]:
    client = MlflowClient(store)
    ids = [experiment.experiment_id for experiment in client.search_experiments(view_type=ViewType.ALL)]
    return list(client.search_runs(ids, run_view_type=ViewType.ALL))


def _only_run(store: str) -> Run:
    (run,) = _runs(store)
    return run


def _held(store: str, run_id: str, of_the_run: bool = True) -> list[tuple[str, int, float]]:
    """Every point MLflow holds, sorted; duplicates stay."""
    client = MlflowClient(store)
    keys = client.get_run(run_id).data.metrics
    points = [(key, point.step, point.value) for key in keys for point in client.get_metric_history(run_id, key)]
    return sorted(point for point in points if ("/" in point[0]) == of_the_run)


def _on_disk(out: Path) -> list[tuple[str, int, float]]:
    return sorted((k, row.step, float(v)) for row in read_metrics(out) for k, v in row.metrics.items() if "/" in k)


def _artifacts(store: str, run_id: str, folder: str | None = None) -> set[str]:
    found: set[str] = set()
    for entry in MlflowClient(store).list_artifacts(run_id, folder):
        found |= _artifacts(store, run_id, entry.path) if entry.is_dir else {entry.path}
    return found


ALL_ARTIFACTS = {
    "config.yaml",
    "overrides.yaml",
    "environment.json",
    "samples.json",
    "summary.json",
    "adapter/adapter_config.json",
}


@pytest.mark.slow
def test_mlflow_holds_what_the_run_folder_holds(store: str, run_info: MakeInfo, mlflow_logger: MakeLogger) -> None:
    info = run_info()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        facts = _train(info, mlflow_logger(store, tags={"team": "nlp"}))
    run = _only_run(store)
    assert facts == {"mlflow_run_id": run.info.run_id}
    assert _held(store, run.info.run_id) == _on_disk(info.out)
    assert len(_on_disk(info.out)) == 20 * 3 + 2 * 2
    assert run.data.params == params_of(info.config)
    assert run.data.params["peft.lora_attn_modules"] == "['q_proj', 'v_proj']"
    assert run.data.tags["team"] == "nlp"
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    summary_numbers = {"val_loss": 1.5, "objective": 1.5, "steps": 20, "tokens": 2000}
    assert {key: run.data.metrics[key] for key in summary_numbers} == summary_numbers
    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("pydoc", info.dataset["fingerprint"][:36])
    assert json.loads(entry.dataset.profile) == info.dataset
    assert _artifacts(store, run.info.run_id) == ALL_ARTIFACTS
    assert MlflowRecord.read(info.out) == MlflowRecord(store, "tuner", run.info.run_id, complete=True)


@pytest.mark.parametrize(("status", "shown"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")])
def test_the_status_is_the_true_one(
    store: str, run_info: MakeInfo, mlflow_logger: MakeLogger, status: str, shown: str
) -> None:
    _train(run_info(), mlflow_logger(store), status=status)
    assert _only_run(store).info.status == shown


def test_training_never_waits_for_mlflow(store: str, run_info: MakeInfo, mlflow_logger: MakeLogger) -> None:
    info = run_info()
    logger = mlflow_logger(store)
    began = time.perf_counter()
    logger.start(info)
    for step, metrics in _rows(last=1000):
        logger.log(step, metrics)
    handed_over_s = time.perf_counter() - began
    facts = logger.close("finished", SUMMARY)
    # A thousand synchronous writes are five seconds; a machine under load may take a while for a thousand hand-overs.
    assert handed_over_s < 2.0
    assert len(_held(store, facts["mlflow_run_id"])) == 1000 * 3 + 100 * 2


def test_nan_and_infinity_arrive(store: str, run_info: MakeInfo, mlflow_logger: MakeLogger) -> None:
    info = run_info()
    _train(info, mlflow_logger(store), iter([(1, {"train/loss": math.nan, "train/grad_norm": math.inf})]))
    points = {key: value for key, _, value in _held(store, _only_run(store).info.run_id)}
    assert math.isnan(points["train/loss"])
    assert points["train/grad_norm"] == sys.float_info.max, "as MLflow keeps an infinity"
    assert ", 0 metric values new" in sync(info.out), "and are known again"


def test_params_mlflow_would_refuse(store: str, run_info: MakeInfo, mlflow_logger: MakeLogger) -> None:
    config = {
        "uri": "http://me:secret@host:1/x@y",
        "a+b": 1,
        "a@b": 2,
        "/lead//er/..": 3,
        "long": "x" * 9000,
        "none": None,
        "empty": "",
        "map": {},
        "é": "ü",
    }
    many = {f"key_{index}": index for index in range(250)}  # more than a batch
    _train(run_info(odd=config, many=many), mlflow_logger(store))
    params = _only_run(store).data.params
    assert (params["odd.a_b"], params["odd.a_b_2"]) == ("1", "2")
    assert len(params["odd.long"]) == 6000
    assert params["odd.uri"] == "http://***@host:1/x@y"
    assert (params["odd.none"], params["odd.empty"], params["odd.map"]) == ("None", "", "{}")
    assert [params[f"many.key_{index}"] for index in range(250)] == [str(index) for index in range(250)]


@pytest.mark.parametrize(
    ("key", "accepted"),
    [
        ("train/loss", "train/loss"),
        ("optimizer.lr", "optimizer.lr"),
        ("a b-c_d:e", "a b-c_d:e"),
        ("+scale", "_scale"),
        ("/a", "a"),
        ("a//b", "a/b"),
        ("../a", "_../a"),
        ("k" * 300, "k" * 250),
    ],
)
def test_sanitise_touches_only_what_must_be(key: str, accepted: str) -> None:
    from mlflow.utils.validation import _validate_metric, _validate_param

    assert sanitise(key) == accepted
    _validate_param(sanitise(key), "1")
    _validate_metric(sanitise(key), 1.0, 0, 0)


def test_a_resumed_run_continues_the_same_mlflow_run(store: str, run_info: MakeInfo, mlflow_logger: MakeLogger) -> None:
    _train(run_info(train={"max_steps": 12}), mlflow_logger(store), _rows(1, 12), status="stopped")
    resumed = run_info(resumed=True, train={"max_steps": 20})
    facts = _train(resumed, mlflow_logger(store), _rows(11, 20))  # steps 11 and 12 are trained again, to the same bits
    run = _only_run(store)
    assert facts["mlflow_run_id"] == run.info.run_id
    assert _held(store, run.info.run_id) == _on_disk(resumed.out)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.max_steps"] == "12", "MLflow's params cannot change"
    assert run.data.tags["resumed.train.max_steps"] == "20"


def test_what_was_measured_in_a_step_that_is_trained_again_stays_as_it_was(
    store: str, run_info: MakeInfo, mlflow_logger: MakeLogger
) -> None:
    def rows(first: int, last: int, speed: float) -> Iterator[tuple[int, dict[str, float]]]:
        for step in range(first, last + 1):
            yield step, {"train/loss": 3 / step, "perf/tokens_per_s": speed + step, "memory/peak_mib": speed}

    _train(run_info(), mlflow_logger(store), rows(1, 12, 100.0), status="stopped")
    resumed = run_info(resumed=True)
    run_id = _train(resumed, mlflow_logger(store), rows(9, 20, 500.0))["mlflow_run_id"]
    assert ", 0 metric values new" in sync(resumed.out)
    expected = [*rows(1, 12, 100.0), *rows(13, 20, 500.0)]
    assert _held(store, run_id) == sorted((key, step, value) for step, row in expected for key, value in row.items())


def test_a_fresh_run_in_the_same_folder_is_another_mlflow_run(
    store: str, run_info: MakeInfo, mlflow_logger: MakeLogger
) -> None:
    for _ in range(2):
        _train(run_info(), mlflow_logger(store))
    assert len(_runs(store)) == 2


def test_a_run_killed_before_its_first_checkpoint_is_continued_in_mlflow(
    store: str, run_info: MakeInfo, mlflow_logger: MakeLogger
) -> None:
    killed = mlflow_logger(store)
    info = run_info()
    killed.start(info)
    for step, metrics in _rows(1, 3):
        killed.log(step, metrics)
    deadline = time.monotonic() + 20
    while not _runs(store) or "train/loss" not in _only_run(store).data.metrics:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert _only_run(store).info.status == "RUNNING"
    facts = _train(run_info(resumed=False), mlflow_logger(store))  # no checkpoint: it begins anew
    run = _only_run(store)
    assert (facts["mlflow_run_id"], run.info.status) == (run.info.run_id, "FINISHED")
    assert _held(store, run.info.run_id) == _on_disk(info.out)


def test_a_trial_stands_under_its_sweep(
    store: str, run_info: MakeInfo, mlflow_logger: MakeLogger, tmp_path: Path
) -> None:
    client = MlflowClient(store)
    parent = client.create_run(client.create_experiment("sweep", (tmp_path / "sweep").as_uri())).info.run_id
    facts = _train(run_info(), mlflow_logger(store, experiment="sweep", run_name="trial 3", parent_run_id=parent))
    run = client.get_run(facts["mlflow_run_id"])
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.info.run_name == "trial 3"


def test_system_metrics_when_asked(
    store: str, run_info: MakeInfo, mlflow_logger: MakeLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    info = run_info()
    logger = mlflow_logger(store, system_metrics=True)
    logger.start(info)
    logger.log(1, {"train/loss": 1.0})
    deadline = time.monotonic() + 20
    while not (_runs(store) and any(key.startswith("system/") for key in _only_run(store).data.metrics)):
        assert time.monotonic() < deadline, "no system metrics"
        time.sleep(0.1)
    logger.close("finished", SUMMARY)


def test_the_address_is_the_key_then_the_environment_then_this_folder(
    mlflow_logger: MakeLogger, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mlflow_logger(None).tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert mlflow_logger(None).tracking_uri == "http://elsewhere:5000"
    assert mlflow_logger("sqlite:////x.db").tracking_uri == "sqlite:////x.db"


# --- a store that is away -------------------------------------------------------------------------------------------


@contextmanager
def _one_warning(match: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(entry.message) for entry in caught if entry.category is RuntimeWarning]
    assert len(messages) == 1, messages
    assert match in messages[0]
    assert "python -m tuner sync " in messages[0]
    assert "\n" not in messages[0]


def _bad_stores(tmp_path: Path, closed_port: int) -> dict[str, tuple[str, str]]:
    (tmp_path / "text.db").write_text("this is no database, but it is long enough to be read as one " * 20)
    (tmp_path / "file").write_text("")
    return {
        "closed port": (f"http://me:secret@127.0.0.1:{closed_port}", "Connection refused"),
        "not a database": (f"sqlite:///{tmp_path}/text.db", "file is not a database"),
        "not a folder": (f"sqlite:///{tmp_path}/file/mlflow.db", "File exists"),
        "not an address": ("carrier-pigeon://coop", "carrier-pigeon"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("which", ["closed port", "not a database", "not a folder", "not an address"])
def test_a_store_that_is_away_is_said_once_and_replayed_afterwards(
    which: str,
    store: str,
    run_info: MakeInfo,
    mlflow_logger: MakeLogger,
    closed_port: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri, words = _bad_stores(tmp_path, closed_port)[which]
    info = run_info(logger={**_settings(), "tracking_uri": uri})
    environment = dict(os.environ)
    with _one_warning(words):
        began = time.perf_counter()
        assert _train(info, mlflow_logger(uri)) == {}
        assert time.perf_counter() - began < 15
    assert dict(os.environ) == environment
    out, err = capfd.readouterr()
    assert (out, err) == ("", ""), "the backend's own words stay off the terminal"
    assert MlflowRecord.read(info.out) == MlflowRecord(uri, "tuner", None, complete=False)
    with pytest.raises(TunerError, match=words) as error:
        sync(info.out)
    assert "secret" not in str(error.value)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert ", 64" not in sync(info.out)
    run = _only_run(store)
    assert _held(store, run.info.run_id) == _on_disk(info.out)
    assert run.info.status == "FINISHED"
    assert _artifacts(store, run.info.run_id) == ALL_ARTIFACTS


def test_a_server_that_never_answers_does_not_hold_the_end_up(
    run_info: MakeInfo, mlflow_logger: MakeLogger, mute_port: int
) -> None:
    logger = mlflow_logger(f"http://127.0.0.1:{mute_port}", connect_timeout_s=60.0, close_timeout_s=1.0)
    with _one_warning("no answer within 1 s"):
        began = time.perf_counter()
        assert _train(run_info(), logger) == {}
        assert time.perf_counter() - began < 5


@pytest.mark.slow
def test_a_server_that_never_answers_is_noticed_while_training(
    run_info: MakeInfo, mlflow_logger: MakeLogger, mute_port: int
) -> None:
    logger = mlflow_logger(f"http://127.0.0.1:{mute_port}", connect_timeout_s=1.0, close_timeout_s=3.0)
    logger.start(run_info())
    with _one_warning("timed out"):
        deadline = time.monotonic() + 15
        step = 0
        while not logger._warned:
            assert time.monotonic() < deadline
            step += 1
            logger.log(step, {"train/loss": 1.0})
            time.sleep(0.05)
        began = time.perf_counter()
        logger.close("finished", SUMMARY)
        assert time.perf_counter() - began < 5


def test_a_process_ends_although_the_server_hangs(run_info: MakeInfo, mute_port: int) -> None:
    script = f"""
from pathlib import Path
from tuner.logging.mlflow import MLflowLogger
from tuner.types import RunInfo
logger = MLflowLogger("http://127.0.0.1:{mute_port}", "tuner", None, {{}}, None, True, False, 0.1, 60.0, 0.5)
logger.start(RunInfo(Path({str(run_info().out)!r}), {{}}, [], {{"name": "x", "fingerprint": "y"}}))
logger.log(1, {{"train/loss": 1.0}})
logger.close("finished", {{}})
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert done.stderr.count("MLflow: ") == 1


def test_a_store_that_comes_back_gets_everything(store: str, run_info: MakeInfo, mlflow_logger: MakeLogger) -> None:
    info = run_info()
    file = Path(store.removeprefix("sqlite:///"))
    away = file.rename(file.with_suffix(".away"))
    file.mkdir()  # SQLite cannot open a folder
    logger = mlflow_logger(store)
    with _one_warning("unable to open database file"):
        logger.start(info)
        for step, metrics in _rows():
            logger.log(step, metrics)
        while not logger._warned:
            logger.log(20, {"train/loss": 3 / 20})  # the value of that step again
            time.sleep(0.02)
        file.rmdir()
        away.rename(file)
        facts = logger.close("finished", SUMMARY)
    assert len(_held(store, facts["mlflow_run_id"])) == 64


def test_an_artifact_that_is_gone_costs_neither_metrics_nor_status(
    store: str, run_info: MakeInfo, mlflow_logger: MakeLogger
) -> None:
    info = run_info()
    logger = mlflow_logger(store)
    logger.start(info)
    logger.artifact(info.out / "adapter")  # never written
    logger.log(1, {"train/loss": 1.0})
    with _one_warning("adapter"):
        logger.close("finished", SUMMARY)
    run = _only_run(store)
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 1.0)
    record = MlflowRecord.read(info.out)
    assert record is not None
    assert not record.complete


def test_the_users_own_logging_is_left_as_it_was(store: str, run_info: MakeInfo, mlflow_logger: MakeLogger) -> None:
    handlers = [handler for name in ("mlflow", "alembic") for handler in logging.getLogger(name).handlers]
    before = [list(handler.filters) for handler in handlers]
    _train(run_info(), mlflow_logger(store))
    assert [list(handler.filters) for handler in handlers] == before


# --- sync -----------------------------------------------------------------------------------------------------------


def _settings() -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((conf_dir() / "logger" / "mlflow.yaml").read_text())
    return {**settings, "connect_timeout_s": 1.0}


def test_sync_brings_a_run_without_a_logger_into_mlflow_and_twice_is_once(
    store: str, run_info: MakeInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.logging.none import NoLogger

    info = run_info()
    assert _train(info, NoLogger()) == {}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert "84 metric values new" in sync(info.out), "64 and tokens at 20 steps"
    run = _only_run(store)
    once = _held(store, run.info.run_id), _held(store, run.info.run_id, of_the_run=False)
    assert once[0] == _on_disk(info.out)
    assert run.data.params == params_of(info.config)
    assert run.info.status == "FINISHED"
    assert run.info.start_time == int(read_metrics(info.out)[0].time * 1000)
    assert MlflowClient(store).get_experiment(run.info.experiment_id).name == _settings()["experiment"]
    assert _artifacts(store, run.info.run_id) == ALL_ARTIFACTS

    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # mlflow.json remembers the store
    assert ", 0 metric values new" in sync(info.out)
    again = _only_run(store)
    assert (_held(store, again.info.run_id), _held(store, again.info.run_id, of_the_run=False)) == once
    assert (again.info.status, again.data.params) == (run.info.status, run.data.params)


def test_sync_after_a_live_run_has_nothing_to_add(store: str, run_info: MakeInfo, mlflow_logger: MakeLogger) -> None:
    info = run_info(logger={**_settings(), "tracking_uri": store})
    facts = _train(info, mlflow_logger(store))
    message = sync(info.out)
    assert facts["mlflow_run_id"] in message
    assert ", 0 metric values new" in message
    assert len(_runs(store)) == 1


def _beat(start: str | None, reason: str | None = None) -> str:
    """Of a process of this machine with this one's number: itself, or one before that began at another time."""
    beat = Beat("here", machine_id(), os.getpid(), str(start), time.time() + 3600, 1, 20, "again", reason)
    return json.dumps(asdict(beat))


@pytest.mark.parametrize(
    ("start", "reason", "said", "status"),
    [
        (None, None, r"has no summary.json \(running, or killed\), so it stays RUNNING", "RUNNING"),
        (process_start(os.getpid()), None, "is running, so it stays RUNNING", "RUNNING"),
        ("1", None, r"was killed \(process .* on here is gone\), so it is KILLED", "KILLED"),
        ("1", "no room", r"failed \(no room\), so it is FAILED", "FAILED"),
    ],
    ids=["unknown", "running", "killed", "failed"],
)
@pytest.mark.parametrize("told", [False, True], ids=["new", "resumed"])
def test_sync_of_a_run_that_has_not_said_how_it_ended(
    store: str,
    run_info: MakeInfo,
    monkeypatch: pytest.MonkeyPatch,
    start: str | None,
    reason: str | None,
    said: str,
    status: str,
    told: bool,
) -> None:
    """Whether or not an earlier process had said how it ended."""
    info = run_info()
    disk = DiskLogger(info.out)
    disk.start(info)
    disk.log(1, {"train/loss": 1.0})
    if start is not None:
        (info.out / HEARTBEAT).write_text(_beat(start, reason))
        if told:
            disk.close("stopped", asdict(Summary("stopped", str(info.out))))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert re.search(f"; it {said} there$", sync(info.out))
    assert _only_run(store).info.status == status


def test_a_run_that_was_killed_is_the_same_one_when_it_goes_on_and_has_ended_well(
    store: str, run_info: MakeInfo, mlflow_logger: MakeLogger
) -> None:
    info = run_info(logger={**_settings(), "tracking_uri": store})
    DiskLogger(info.out).start(info)
    (info.out / HEARTBEAT).write_text(_beat("1"))
    sync(info.out)
    killed = _only_run(store)
    assert (killed.info.status, killed.data.tags["status"]) == ("KILLED", "killed")
    assert killed.data.tags["reason"] == f"process {os.getpid()} on here is gone"
    logger = mlflow_logger(store)
    logger.start(replace(info, resumed=True))
    logger.close("finished", asdict(Summary("finished", str(info.out))))
    run = _only_run(store)
    assert (run.info.run_id, run.info.status) == (killed.info.run_id, "FINISHED")
    assert run.data.tags["status"] == "finished"
    assert "reason" not in run.data.tags, "why it broke off once is not why it ended"


def test_sync_makes_the_run_anew_where_the_store_lost_it(
    store: str, run_info: MakeInfo, mlflow_logger: MakeLogger
) -> None:
    info = run_info(logger={**_settings(), "tracking_uri": store})
    lost = _train(info, mlflow_logger(store))["mlflow_run_id"]
    with sqlite3.connect(store.removeprefix("sqlite:///")) as connection:
        for table in ("params", "metrics", "latest_metrics", "tags", "runs"):
            connection.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (lost,))
    sync(info.out)
    run = _only_run(store)
    assert run.info.run_id != lost
    assert _held(store, run.info.run_id) == _on_disk(info.out)


def test_sync_of_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(TunerError, match=r"is not a run folder: it has no config\.yaml"):
        sync(tmp_path)


# --- several processes ----------------------------------------------------------------------------------------------

_THREE = """
import multiprocessing, sys
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store  # before the start, so that all three reach the missing store together
from tuner.logging.mlflow import MLflowLogger
from tuner.types import RunInfo

def train(folder, name, start):
    logger = MLflowLogger(f"sqlite:///{folder}/mlflow.db", "tuner", None, {}, None, True, False, 0.1, 10.0, 100.0)
    start.wait()
    logger.start(RunInfo(folder / name, {"name": name}, [], {"name": "pydoc", "fingerprint": "f"}))
    for step in range(1, 101):
        logger.log(step, {"train/loss": step + len(name) / 8})
    sys.exit(0 if "mlflow_run_id" in logger.close("finished", {"steps": 100}) else 1)

context = multiprocessing.get_context("fork")
start = context.Barrier(3)
processes = [context.Process(target=train, args=(Path(sys.argv[1]), name, start)) for name in ("a", "bb", "ccc")]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(sum(process.exitcode for process in processes))
"""


@pytest.mark.slow
def test_three_processes_at_once_without_a_store(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONWARNINGS": "error::RuntimeWarning"}
    command = [sys.executable, "-c", _THREE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    runs = {run.info.run_name: run.info.run_id for run in _runs(store)}
    assert set(runs) == {"a", "bb", "ccc"}
    for name, run_id in runs.items():
        assert _held(store, run_id) == [("train/loss", step, step + len(name) / 8) for step in range(1, 101)]


# --- a real server --------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def server(fresh_store: Path, tmp_path: Path) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """Address of a real server, and how to stop and to start it."""
    import shutil

    import requests

    file = shutil.copy(fresh_store, tmp_path / "server.db")
    port = _free_port()
    uri = f"http://127.0.0.1:{port}"
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{file}"]
        command += ["--artifacts-destination", str(tmp_path / "artifacts")]
        quiet = subprocess.DEVNULL
        # Without it the server starts eight processes more, for evaluations of its own.
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        running.append(subprocess.Popen(command, stdout=quiet, stderr=quiet, env=env, start_new_session=True))
        deadline = time.monotonic() + 90
        while True:
            try:
                if requests.get(f"{uri}/health", timeout=2).ok:
                    return
            except requests.RequestException:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.3)

    def stop() -> None:
        while running:
            process = running.pop()
            os.killpg(process.pid, 9)  # the server's workers too: it is the leader of its own session
            process.wait()

    start()
    yield uri, stop, start
    stop()


@pytest.mark.slow
def test_a_real_server_that_goes_away_and_comes_back(
    server: tuple[str, Callable[[], None], Callable[[], None]], run_info: MakeInfo, mlflow_logger: MakeLogger
) -> None:
    uri, stop, start = server
    whole = run_info("whole")
    facts = _train(whole, mlflow_logger(uri, connect_timeout_s=10.0))
    assert _held(uri, facts["mlflow_run_id"]) == _on_disk(whole.out)
    assert _artifacts(uri, facts["mlflow_run_id"]) == ALL_ARTIFACTS

    broken = run_info("broken", logger={**_settings(), "tracking_uri": uri})
    gone = threading.Event()

    def rows() -> Iterator[tuple[int, dict[str, float]]]:
        for step, metrics in _rows():
            if step == 11 and not gone.is_set():
                time.sleep(2)  # the first half has arrived
                stop()
                gone.set()
            yield step, metrics

    with _one_warning("Connection refused"):
        facts = _train(broken, mlflow_logger(uri, connect_timeout_s=5.0), rows())
    start()
    run_id = facts["mlflow_run_id"]
    client = MlflowClient(uri)
    assert client.get_run(run_id).info.status == "RUNNING"
    assert 0 < len(_held(uri, run_id)) < len(_on_disk(broken.out))
    assert run_id in sync(broken.out)
    assert _held(uri, run_id) == _on_disk(broken.out)
    assert client.get_run(run_id).info.status == "FINISHED"


def test_silence_ends_with_the_block(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("urllib3.connectionpool")
    with silent():
        logger.warning("Retrying")
    logger.warning("said")
    assert [record.getMessage() for record in caplog.records] == ["said"]
