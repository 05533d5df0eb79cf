"""Precision: what the names mean, and what happens on a GPU without bfloat16."""

from __future__ import annotations

import importlib
import inspect
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tuner.errors import ConfigError
from tuner.precision.amp_bf16 import amp_bf16
from tuner.precision.amp_fp16 import amp_fp16
from tuner.precision.bf16 import bf16
from tuner.precision.bf16_stochastic import bf16_stochastic
from tuner.precision.fp32 import fp32
from tuner.precision.resolve import resolve
from tuner.types import Precision

CONF = Path(__file__).parents[2] / "conf" / "precision"
MEMBERS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}


def half(trainable: Any) -> Precision:
    return amp_fp16(trainable, 65536.0, 2000)


def test_all_members_are_found() -> None:
    assert set(MEMBERS) >= {"fp32", "bf16", "amp_bf16", "amp_fp16", "bf16_stochastic"}


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_names_a_dtype_and_lists_its_signature(name: str) -> None:
    module, _, attribute = MEMBERS[name]["_target_"].rpartition(".")
    function = getattr(importlib.import_module(module), attribute)
    keys = {key: value for key, value in MEMBERS[name].items() if not key.startswith("_")}
    assert list(inspect.signature(function).parameters) == list(keys)
    precision = function(**keys)
    assert precision.name == name
    assert isinstance(getattr(torch, precision.compute), torch.dtype)
    assert precision.held == ("float32" if name.startswith("amp_") else precision.compute)
    assert precision.trainable == ("bf16" if name == "bf16_stochastic" else "auto")
    assert (precision.initial_loss_scale is not None) is (precision.compute == "float16")
    assert precision.stochastic_rounding is (name == "bf16_stochastic")


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that computes bfloat16 only by emulation."""

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


@pytest.mark.parametrize("make", [fp32, bf16, amp_bf16, half, bf16_stochastic])
def test_a_cpu_runs_what_was_asked(make: Any) -> None:
    asked = make("auto")
    assert resolve(asked, torch.device("cpu")) == (asked, None)


@pytest.mark.usefixtures("old_gpu")
@pytest.mark.parametrize(("trainable", "expected"), [("auto", "auto"), ("fp32", "fp32"), ("bf16", "fp32")])
def test_an_old_gpu_falls_back_to_fp32_and_says_so(trainable: Any, expected: str) -> None:
    precision, line = resolve(bf16(trainable), torch.device("cuda", 0))
    assert precision == Precision("fp32", "float32", expected)
    assert line == "precision: Tesla T4 has no bfloat16, so this run uses fp32"


@pytest.mark.usefixtures("old_gpu")
def test_the_other_members_fall_back_too() -> None:
    mixed, line = resolve(amp_bf16("auto"), torch.device("cuda", 0))
    assert mixed == Precision("fp32", "float32", "auto")
    assert line is not None
    assert line.endswith("has no bfloat16, so this run uses fp32; precision=amp_fp16 computes in 16 bits on it")
    rounded, line = resolve(bf16_stochastic("bf16"), torch.device("cuda", 0))
    assert rounded == Precision("fp32", "float32", "fp32")
    assert line == "precision: Tesla T4 has no bfloat16, so this run uses fp32"


@pytest.mark.usefixtures("old_gpu")
@pytest.mark.parametrize(("capability", "runs"), [((7, 5), True), ((5, 3), True), ((5, 2), False), ((3, 5), False)])
def test_fp16_runs_on_an_old_gpu_and_is_refused_on_one_without_it(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if runs:
        assert resolve(half("auto"), torch.device("cuda", 0)) == (half("auto"), None)
        return
    said = f"precision=amp_fp16: Tesla T4 has no float16 (compute capability {capability[0]}.{capability[1]}, and"
    with pytest.raises(ConfigError, match=re.escape(said)):
        resolve(half("auto"), torch.device("cuda", 0))


def test_pytorchs_own_mixed_precision_computes_both_on_a_cpu() -> None:
    """Why `amp_fp16` is not refused there; PyTorch warns and computes in fp32 where it does not support a dtype."""
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert torch.nn.Linear(4, 4)(torch.ones(1, 4)).dtype == dtype
    assert torch.amp.GradScaler("cpu").is_enabled()


@pytest.mark.usefixtures("old_gpu")
def test_an_old_gpu_runs_fp32_as_asked() -> None:
    assert resolve(fp32("auto"), torch.device("cuda", 0)) == (fp32("auto"), None)


def test_a_gpu_with_bf16_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert resolve(bf16("auto"), torch.device("cuda", 0)) == (bf16("auto"), None)
