"""`train.deterministic`: what it sets for as long as a run lasts, what it refuses, and that nothing of it is left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tuner
from tuner import determinism
from tuner.determinism import CUBLAS, deterministic
from tuner.errors import ConfigError
from tuner.measure import Speed

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Cuda:
    """Whether CUDA has started in this process, as a test says."""

    def __init__(self) -> None:
        self.started = False

    def is_initialized(self) -> bool:
        return self.started


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "is_initialized", cuda.is_initialized)
    monkeypatch.setattr(determinism, "_started_so", False)
    monkeypatch.delenv(CUBLAS, raising=False)
    return cuda


def settings() -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    algorithms = torch.are_deterministic_algorithms_enabled(), warn_only
    return *algorithms, cudnn.deterministic, cudnn.benchmark, os.environ.get(CUBLAS)


DETERMINISTIC = (True, False, True, False)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("device", "workspace"), [(CPU, None), (GPU, ":4096:8")])
def test_it_holds_within_and_leaves_nothing(device: torch.device, workspace: str | None) -> None:
    before = settings()
    assert before[0] is False
    with deterministic(True, device):
        assert settings() == (*DETERMINISTIC, workspace)
    assert settings() == before
    with pytest.raises(ZeroDivisionError), deterministic(True, device):
        1 / 0  # noqa: B018
    assert settings() == before
    with deterministic(False, device):
        assert settings() == before


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("own", "within"), [(":16:8", ":16:8"), (":0:0", ":4096:8")])
def test_what_the_caller_had_set_is_there_again(own: str, within: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, own)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with deterministic(True, CPU):
        torch.use_deterministic_algorithms(True, warn_only=True)
        before = settings()
        with deterministic(True, GPU):
            assert settings() == (*DETERMINISTIC, within)
        assert settings() == before
    assert settings()[2:] == (False, True, own)


def test_a_process_that_started_cuda_without_it_is_refused(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.started = True
    before = settings()
    said = r"train\.deterministic=true: CUDA was started in this process with CUBLAS_WORKSPACE_CONFIG=\(not set\)"
    with pytest.raises(ConfigError, match=said), deterministic(True, GPU):
        raise AssertionError("it is refused before anything is computed")
    assert settings() == before
    with deterministic(True, CPU):
        assert settings() == (*DETERMINISTIC, None)
    monkeypatch.setenv(CUBLAS, ":4096:8")
    with deterministic(True, GPU):
        assert settings() == (*DETERMINISTIC, ":4096:8")


def test_a_second_run_in_a_process_that_started_cuda_with_it_is_fine(cuda: Cuda) -> None:
    with deterministic(True, GPU):
        cuda.started = True
    assert CUBLAS not in os.environ
    with deterministic(True, GPU):
        assert settings() == (*DETERMINISTIC, ":4096:8")
    assert CUBLAS not in os.environ


@pytest.mark.parametrize(
    "words",
    [
        ["peft=lora", "peft.lora_dropout=0.1", "train.num_samples=1"],
        pytest.param(["peft=qlora", "precision=bf16", "data.packing=pack"], marks=pytest.mark.slow),
        pytest.param(["peft=full", "model.add_tokens=['It ','Add']"], marks=pytest.mark.slow),
        pytest.param(["peft=lora", "model.add_tokens=['It ','Add']"], marks=pytest.mark.slow),
    ],
    ids=["lora", "packed", "full", "new tokens"],
)
def test_on_a_cpu_it_changes_no_bit(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    add = Speed.add

    def observed(speed: Speed, tokens: int, seconds: float) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        add(speed, tokens, seconds)

    monkeypatch.setattr(Speed, "add", observed)
    rows = [{"instruction": f"Add {i}.", "output": f"It is {i}."} for i in range(60)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=alpaca", "data.path=sums.jsonl", "data.val_fraction=0.1"]
    few = ["model=tiny", *data, "device=cpu", "logger=none", "train.max_steps=3", "train.num_samples=0"]
    found = []
    for wanted in ("true", "false"):
        threads = f"train.num_threads={torch.get_num_threads()}"
        run = tuner.compose([*few, threads, *words, f"train.deterministic={wanted}", f"out=run-{wanted}"])
        summary = tuner.run(run)
        (file,) = [
            path for kind in ("adapter", "model") for path in sorted((Path(summary.out) / kind).glob("*.safet*"))
        ]
        found.append((summary.val_loss, load_file(file)))
        assert not torch.are_deterministic_algorithms_enabled()
    assert seen == [True] * 3 + [False] * 3
    (loss, weights), (expected_loss, expected) = found
    assert loss == expected_loss
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
