"""TensorBoard's event files and W&B's offline folders, read back."""

from __future__ import annotations

import json
import math
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tuner.logging.tensorboard import TensorBoardLogger
from tuner.logging.wandb import WandbLogger
from tuner.types import RunInfo

MakeInfo = Callable[..., RunInfo]


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_every_value(run_info: MakeInfo) -> None:
    info = run_info()
    logger = TensorBoardLogger(None, 0.1, 20.0)
    logger.start(info)
    for step in range(1, 9):
        logger.log(step, {"train/loss": 1 / step, "tokens": step * 8})
    logger.log(8, {"val/loss": math.nan})
    assert logger.close("finished", {"steps": 8, "val_loss": 0.75, "status": "finished"}) == {}
    scalars = _scalars(info.out / "tensorboard")
    # event files hold float32
    assert scalars["train/loss"] == [(step, pytest.approx(1 / step, rel=1e-7)) for step in range(1, 9)]
    assert scalars["tokens"] == [(step, step * 8) for step in range(1, 9)]
    assert scalars["val/loss"][0][0] == 8
    assert math.isnan(scalars["val/loss"][0][1])
    assert [value for _, value in scalars["summary/val_loss"]] == [0.75]


def test_tensorboard_forgets_the_steps_a_resumed_run_does_again(run_info: MakeInfo, tmp_path: Path) -> None:
    for resumed, steps in ((False, range(1, 7)), (True, range(5, 9))):
        logger = TensorBoardLogger(str(tmp_path / "elsewhere"), 0.1, 20.0)
        logger.start(run_info(resumed=resumed))
        for step in steps:
            logger.log(step, {"train/loss": float(step)})
        logger.close("finished", {"steps": steps[-1]})
    scalars = _scalars(tmp_path / "elsewhere")
    assert scalars["train/loss"] == [(step, float(step)) for step in range(1, 9)]


def test_tensorboard_that_cannot_write_is_said_once(run_info: MakeInfo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    logger = TensorBoardLogger(str(tmp_path / "file" / "runs"), 0.1, 20.0)
    logger.start(run_info())
    with pytest.warns(RuntimeWarning, match=r"TensorBoard: .*Not a directory") as caught:
        logger.close("finished", {})
    assert len(caught) == 1


def _wandb(mode: str) -> WandbLogger:
    return WandbLogger("tuner", None, None, ["a"], mode, 0.1, 10.0, 30.0)  # type: ignore[arg-type]


def _log_records(data: bytes) -> Iterator[bytes]:
    """Records of W&B's file: LevelDB's log (blocks of 32 KiB, fragments of type 1 to 4) after 7 bytes of name."""
    parts, at = b"", 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # the rest of a block is too short for a fragment's head
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield parts
            parts = b""


def _offline_history(file: Path) -> list[dict[str, object]]:
    """What an offline run's file holds of `log`."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in _log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_wandb_offline_holds_every_value_and_a_resumed_run_its_id(run_info: MakeInfo) -> None:
    ids = []
    for resumed in (False, True):
        info = run_info(resumed=resumed)
        logger = _wandb("offline")
        logger.start(info)
        for step in range(1, 5):
            logger.log(step, {"train/loss": 1 / step})
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            ids.append(logger.close("finished", {"steps": 4, "val_loss": 0.75})["wandb_run_id"])
    assert ids[0] == ids[1]
    files = sorted((info.out / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))
    assert files
    history = [(row["step"], row["train/loss"]) for row in _offline_history(files[0])]
    assert history == [(step, 1 / step) for step in range(1, 5)]


def test_wandb_without_a_server_is_said_once(
    run_info: MakeInfo, monkeypatch: pytest.MonkeyPatch, closed_port: int, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    logger = WandbLogger("tuner", None, None, [], "online", 0.1, 1.0, 10.0)
    logger.start(run_info())
    with pytest.warns(RuntimeWarning, match=r"W&B: .*the run goes on") as caught:
        assert logger.close("finished", {}) == {}
    assert len([entry for entry in caught if entry.category is RuntimeWarning]) == 1
