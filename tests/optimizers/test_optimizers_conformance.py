"""Every member of the optimizer group: equals its reference class bit for bit, learns, resumes.

Parameters are fp32 and bf16, one of more than 4096 elements, so that 8-bit state is really used, and two smaller ones.
"""

from __future__ import annotations

import importlib
import inspect
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer

from tuner.errors import ConfigError
from tuner.quiet import import_bitsandbytes

CONF = Path(__file__).parents[2] / "conf" / "optimizer"
CONFIGS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}
MEMBERS = {name: config for name, config in CONFIGS.items() if config["_target_"].startswith("tuner.")}
SHAPES = [(96, 64), (130,), (8, 64)]
DTYPES = [torch.float32, torch.bfloat16]

REFERENCES = {
    "adamw": "torch.optim.AdamW",
    "sgd": "torch.optim.SGD",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adam8bit": "bitsandbytes.optim.Adam8bit",
    "paged_adamw": "bitsandbytes.optim.PagedAdamW",
    "paged_adamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
}

every_member = pytest.mark.parametrize("name", MEMBERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def function(name: str) -> Any:
    module, _, attribute = MEMBERS[name]["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def keys_of(name: str) -> dict[str, Any]:
    return {key: value for key, value in MEMBERS[name].items() if not key.startswith("_")}


def changed(keys: dict[str, Any]) -> dict[str, Any]:
    """Another value for every key, so that one which is not passed on is seen."""
    other = {"lr": 0.03, "betas": [0.8, 0.95], "eps": 1e-3, "weight_decay": 0.2, "momentum": 0.5, "nesterov": True}
    other |= {"fused": False, "min_8bit_size": 200}
    return {key: other[key] for key in keys}


def new_params(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(params: list[nn.Parameter], steps: int) -> Iterator[None]:
    """Sets the same random gradients in each call."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        yield


def assert_equal(some: list[nn.Parameter], others: list[nn.Parameter]) -> None:
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(autouse=True)
def paging_is_not_the_point(request: pytest.FixtureRequest) -> Iterator[None]:
    with warnings.catch_warnings():
        if "paging" not in request.node.name:
            warnings.filterwarnings("ignore", message="optimizer: nothing is paged")
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        yield


def test_all_members_are_found_and_have_a_reference() -> None:
    assert set(MEMBERS) >= set(REFERENCES)
    assert set(CONFIGS) - set(MEMBERS) == {"custom"}


@pytest.mark.parametrize("name", REFERENCES)
def test_is_the_class_its_name_says(name: str) -> None:
    optimizer = function(name)(new_params(torch.float32), **keys_of(name))
    module, _, attribute = REFERENCES[name].rpartition(".")
    import_bitsandbytes()
    assert type(optimizer) is getattr(importlib.import_module(module), attribute)


@every_member
def test_the_yaml_lists_exactly_the_signature(name: str) -> None:
    parameters = inspect.signature(function(name)).parameters
    assert ["params", *keys_of(name)] == list(parameters)
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters.values())
    assert MEMBERS[name]["_partial_"] is True


@every_member
@every_dtype
@pytest.mark.parametrize("change", [False, True], ids=["as_in_yaml", "every_key_changed"])
def test_steps_equal_the_reference_class(name: str, dtype: torch.dtype, change: bool) -> None:
    keys = changed(keys_of(name)) if change else keys_of(name)
    ours, theirs = new_params(dtype), new_params(dtype)
    optimizer = function(name)(ours, **keys)
    reference = type(optimizer)(theirs, **keys)
    start = [param.detach().clone() for param in ours]
    for _ in zip(gradients(ours, 5), gradients(theirs, 5), strict=True):
        optimizer.step()
        reference.step()
    assert_equal(ours, theirs)
    assert not any(torch.equal(param, before) for param, before in zip(ours, start, strict=True))


@every_member
@every_dtype
def test_two_runs_are_bitwise_equal(name: str, dtype: torch.dtype) -> None:
    once, again = new_params(dtype), new_params(dtype)
    for params in (once, again):
        optimizer = function(name)(params, **keys_of(name))
        for _ in gradients(params, 5):
            optimizer.step()
    assert_equal(once, again)


@every_member
@every_dtype
def test_lowers_a_quadratic(name: str, dtype: torch.dtype) -> None:
    params = new_params(dtype)
    optimizer = function(name)(params, **keys_of(name) | {"lr": 0.05, "weight_decay": 0.0})

    def loss() -> Tensor:
        return sum(((param.float() - 1.0).square().sum() for param in params), torch.zeros(()))

    before = loss().item()
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.3 * before


@every_member
@every_dtype
def test_resumes_bitwise_from_a_weights_only_file(name: str, dtype: torch.dtype) -> None:
    straight = new_params(dtype)
    optimizer = function(name)(straight, **keys_of(name))
    steps = gradients(straight, 6)
    for _ in range(3):
        next(steps)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"params": [param.detach() for param in straight], "optimizer": optimizer.state_dict()}, file)
    for _ in steps:
        optimizer.step()

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(tensor) for tensor in saved["params"]]
    optimizer = function(name)(resumed, **keys_of(name))
    optimizer.load_state_dict(saved["optimizer"])
    for index, _ in enumerate(gradients(resumed, 6)):
        if index >= 3:
            optimizer.step()
    assert_equal(straight, resumed)


@every_member
def test_the_learning_rate_of_a_group_is_read_at_each_step(name: str) -> None:
    params = new_params(torch.float32)
    optimizer: Optimizer = function(name)(params, **keys_of(name))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [param.detach().clone() for param in params]
    for _ in gradients(params, 2):
        optimizer.step()
    assert_equal(params, [nn.Parameter(tensor) for tensor in before])


@every_member
def test_takes_parameter_groups(name: str) -> None:
    first, *rest = new_params(torch.float32)
    optimizer = function(name)([{"params": [first], "lr": 0.5}, {"params": rest}], **keys_of(name))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, keys_of(name)["lr"]]


@pytest.mark.parametrize("name", [name for name in MEMBERS if "8bit" in name])
@every_dtype
def test_8bit_state_is_8_bits_where_it_should_be(name: str, dtype: torch.dtype) -> None:
    params = new_params(dtype)
    optimizer = function(name)(params, **keys_of(name))
    for _ in gradients(params, 1):
        optimizer.step()
    dtypes = [{optimizer.state[param][key].dtype for key in ("state1", "state2")} for param in params]
    assert dtypes == [{torch.uint8}, {torch.float32}, {torch.float32}]


@pytest.mark.parametrize(("name", "tolerance"), [("paged_adamw", 1e-6), ("adamw8bit", 2e-2), ("paged_adamw8bit", 2e-2)])
def test_bitsandbytes_adamw_is_adamw(name: str, tolerance: float) -> None:
    """Against PyTorch's, fp32, weights of size 1 after 20 steps of 0.01.

    32-bit state differs by rounding only. 8-bit state rounds each moment to 256 levels at each step, which turns single
    updates by up to a few tenths of the learning rate; 20 of them stay within twice the learning rate.
    """
    keys = {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = new_params(torch.float32), new_params(torch.float32)
    optimizer = function(name)(ours, **keys_of(name) | keys)
    reference = torch.optim.AdamW(theirs, **keys)
    for _ in zip(gradients(ours, 20), gradients(theirs, 20), strict=True):
        optimizer.step()
        reference.step()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in MEMBERS if name.startswith("paged")])
def test_paging_on_a_cpu_is_said_once_in_our_words(name: str) -> None:
    params = new_params(torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = function(name)(params, **keys_of(name))
        for _ in gradients(params, 2):
            optimizer.step()
    assert [str(warning.message) for warning in caught] == [
        "optimizer: nothing is paged on a CPU; the optimizer computes the same with its state in ordinary memory"
    ]


@pytest.mark.parametrize("name", [name for name in MEMBERS if "betas" in MEMBERS[name]])
@pytest.mark.parametrize("betas", [[0.9], [0.9, 0.99, 0.999], [0.9, 1.0], [-0.1, 0.9]])
def test_impossible_betas_are_refused(name: str, betas: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.betas=.*must be two numbers, each >= 0 and < 1"):
        function(name)(new_params(torch.float32), **keys_of(name) | {"betas": betas})


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.nesterov=true needs momentum"):
        function("sgd")(new_params(torch.float32), **keys_of("sgd") | {"momentum": 0.0, "nesterov": True})
