"""compose and freeze: from anywhere, leaving nothing behind, meaning the same in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import tuner
from tuner.config import check, compose, freeze
from tuner.errors import ConfigError


def test_words_are_applied() -> None:
    cfg = compose(["optimizer.lr=3e-4", "peft=rslora"])
    assert cfg.optimizer.lr == 3e-4
    assert cfg.peft.use_rslora is True
    assert "hydra" not in cfg


def test_qlora_brings_its_quantization_unless_the_person_says_otherwise() -> None:
    assert compose(["peft=qlora"]).quantization._target_ == "tuner.quantization.nf4.NF4"
    assert compose(["peft=qlora", "quantization=none"]).quantization._target_.endswith("NoQuantization")


@pytest.mark.parametrize(
    ("words", "optimizer"),
    [
        (["memory=low"], "adamw8bit"),
        (["memory=low", "optimizer=sgd"], "sgd"),
        (["optimizer=sgd", "memory=low"], "sgd"),
        (["memory=low", "peft=qlora"], "adamw8bit"),
        (["experiment=full_single_device", "memory=low"], "paged_adamw8bit"),
        (["memory=default"], "adamw"),
    ],
)
def test_low_memory_brings_its_optimizer_unless_one_is_named(words: list[str], optimizer: str) -> None:
    cfg = compose(words)
    assert cfg.optimizer._target_ == f"tuner.optimizers.{optimizer}.{optimizer}"
    assert cfg.memory.activation_checkpointing == ("none" if "memory=default" in words else "full")
    assert set(cfg.memory) == set(compose().memory)
    check(cfg)


def test_needs_no_global_hydra_and_leaves_none() -> None:
    GlobalHydra.instance().clear()
    compose()
    assert not GlobalHydra.instance().is_initialized()


def test_works_inside_another_hydra_application(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose(["seed=7"]).seed == 7
        assert hydra.compose("other") == {"a": 1}


def test_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert freeze(compose()).out.startswith(f"{tmp_path}/outputs/")
    assert list(tmp_path.iterdir()) == []


def test_each_run_has_a_folder_of_its_own() -> None:
    assert len({compose().out for _ in range(5)}) == 5


def test_one_configuration_has_one_folder_however_often_it_is_read() -> None:
    cfg = compose()
    assert freeze(cfg).out == freeze(cfg).out == str(Path(cfg.out).absolute())


def test_frozen_names_what_would_differ_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    cfg = compose(
        ["data=alpaca", "data.path=mine.jsonl", "data.val_path=other/*.csv", "model.path='~/folder'", "out=here"]
    )
    frozen = freeze(cfg)
    assert frozen.out == f"{tmp_path}/here"
    assert frozen.data.path == f"{tmp_path}/mine.jsonl"
    assert frozen.data.val_path == f"{tmp_path}/other/*.csv"
    assert frozen.model.path == f"{Path.home()}/folder"
    assert frozen.train.num_threads == len(os.sched_getaffinity(0))
    assert frozen.logger.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert cfg.train.num_threads is None, "the composed configuration stays as it was"
    monkeypatch.chdir("/")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert freeze(frozen) == frozen


@pytest.mark.parametrize(
    ("word", "environment", "expected"),
    [
        (None, None, "sqlite:///{cwd}/mlflow.db"),
        (None, "http://server:5000", "http://server:5000"),
        (None, "sqlite:///mine.db", "sqlite:///{cwd}/mine.db"),
        ("http://other", "http://server:5000", "http://other"),
        ("sqlite:////data/mlflow.db", None, "sqlite:////data/mlflow.db"),
        ("sqlite:///:memory:", None, "sqlite:///:memory:"),
        ("sqlite:///", None, "sqlite:///"),
        ("sqlite:///file:shared?mode=memory&uri=true", None, "sqlite:///file:shared?mode=memory&uri=true"),
    ],
)
def test_where_mlflow_keeps_its_runs(
    word: str | None, environment: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if environment:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
    words = [f"logger.tracking_uri='{word}'"] if word else []
    assert freeze(compose(words)).logger.tracking_uri == expected.format(cwd=tmp_path)


def test_each_of_many_loggers_is_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frozen = freeze(compose(["logger=many", "logger.loggers.tensorboard.log_dir=events"]))
    assert frozen.logger.loggers.mlflow.tracking_uri.startswith("sqlite:////")
    assert frozen.logger.loggers.tensorboard.log_dir == f"{tmp_path}/events"


@pytest.mark.parametrize(
    ("said", "frozen"),
    [("events", "{cwd}/events"), ("~/events", "{home}/events"), ("/e", "/e"), ("s3://b/e", "s3://b/e"), (None, None)],
)
def test_where_tensorboard_writes_is_absolute(
    said: str | None, frozen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"logger.log_dir='{said}'"] if said else []
    expected = frozen and frozen.format(cwd=tmp_path, home=Path.home())
    assert freeze(compose(["logger=tensorboard", *words])).logger.log_dir == expected


def test_a_frozen_configuration_read_back_from_its_file_is_checked_like_a_new_one(tmp_path: Path) -> None:
    frozen = freeze(compose(["model=tiny"]))
    OmegaConf.save(frozen, tmp_path / "config.yaml")
    read = OmegaConf.load(tmp_path / "config.yaml")
    assert read == frozen
    check(OmegaConf.to_container(read))  # type: ignore[arg-type]
    assert "${" not in (tmp_path / "config.yaml").read_text()


def test_a_folder_of_ones_own_goes_first(tmp_path: Path) -> None:
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "mine.yaml").write_text("defaults: [cosine, _self_]\nwarmup_steps: 9\n")
    assert compose(["schedule=mine"], config_dir=str(tmp_path)).schedule.warmup_steps == 9
    with pytest.raises(ConfigError, match="mine: no such option"):
        compose(["schedule=mine"])


def test_the_public_api_is_the_same() -> None:
    cfg = tuner.compose(["model=tiny", "seed=3"])
    tuner.check(cfg)
    assert cfg.seed == 3


def test_composing_and_checking_import_nothing_heavy() -> None:
    program = (
        "import sys, tuner\n"
        "assert not {'hydra', 'torch'} & set(sys.modules)\n"
        "tuner.check(tuner.compose())\n"
        "heavy = {'torch', 'numpy', 'mlflow', 'bitsandbytes', 'tokenizers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
