"""Every member of the optimizer group: equals its reference class bit for bit, learns, resumes.

Parameters are fp32 and bf16, one of more than 4096 elements, so that 8-bit state is really used, and two smaller ones.
"""

from __future__ import annotations

import copy
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
from tuner.optimizers.custom import OURS
from tuner.optimizers.groups import Trained
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
    "adafactor": "torch.optim.Adafactor",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "paged_lion8bit": "bitsandbytes.optim.PagedLion8bit",
    "ademamix8bit": "bitsandbytes.optim.AdEMAMix8bit",
    "paged_ademamix8bit": "bitsandbytes.optim.PagedAdEMAMix8bit",
}
SEVERAL = {"muon"}
"""Members that step with more than one class, and have a test of their own against those."""

RATES = {"muon": 1.0}
"""Of members for which others' 0.05 is too short: the quadratic's matrix of ones is one direction in 64, and a step of
Muon goes as far in each of them."""

every_member = pytest.mark.parametrize("name", MEMBERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def function(name: str) -> Any:
    module, _, attribute = MEMBERS[name]["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def keys_of(name: str) -> dict[str, Any]:
    return {key: value for key, value in MEMBERS[name].items() if not key.startswith("_")}


OTHER_VALUES: dict[str, Any] = {
    "lr": 0.03,
    "eps": 1e-3,
    "weight_decay": 0.2,
    "momentum": 0.5,
    "nesterov": True,
    "fused": False,
    "min_8bit_size": 200,
    "beta2_decay": -0.5,
    "d": 1.5,
    "alpha": 2.0,
    "t_alpha": 3,
    "t_beta3": 4,
    "ns_steps": 3,
    "adjust_lr_fn": "original",
    "adamw_lr": 0.02,
    "adamw_betas": [0.7, 0.9],
    "adamw_eps": 1e-2,
    "loraplus_lr_ratio": None,
    "no_decay": [],
}


def changed(keys: dict[str, Any]) -> dict[str, Any]:
    """Another value for every key, so that one which is not passed on is seen."""
    lists = {"betas": [0.8, 0.95, 0.99][: len(keys.get("betas", []))]}
    lists |= {"eps": [1e-2, 1e-1]} if isinstance(keys.get("eps"), list) else {}
    other = OTHER_VALUES | lists | ({"nesterov": not keys["nesterov"]} if "nesterov" in keys else {})
    return {key: other[key] for key in keys}


def reference(name: str, params: list[nn.Parameter], keys: dict[str, Any]) -> list[Optimizer]:
    """The library's own classes over `params`."""
    keys = {key: value for key, value in keys.items() if key not in OURS}
    if name == "muon":
        rest = {key: keys.pop(f"adamw_{key}") for key in ("lr", "betas", "eps")}
        rest |= {"lr": rest["lr"] or keys["lr"], "weight_decay": keys["weight_decay"]}
        matrices, others = ([p for p in params if (p.dim() == 2) is matrix] for matrix in (True, False))
        return [torch.optim.Muon(matrices, **keys), torch.optim.AdamW(others, **rest, fused=True)]
    module, _, attribute = REFERENCES[name].rpartition(".")
    import_bitsandbytes()
    return [getattr(importlib.import_module(module), attribute)(params, **keys)]


def new_params(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def given(params: list[nn.Parameter]) -> list[Trained]:
    """As an optimizer of ours takes them."""
    return [Trained(str(n), param, "matrices" if param.dim() == 2 else "vectors") for n, param in enumerate(params)]


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
    assert set(MEMBERS) == {*REFERENCES, *SEVERAL}
    assert set(CONFIGS) - set(MEMBERS) == {"custom"}


@pytest.mark.parametrize("name", REFERENCES)
def test_is_the_class_its_name_says(name: str) -> None:
    optimizer = function(name)(given(new_params(torch.float32)), **keys_of(name))
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
    optimizer = function(name)(given(ours), **keys)
    expected = reference(name, theirs, keys)
    start = [param.detach().clone() for param in ours]
    for _ in zip(gradients(ours, 5), gradients(theirs, 5), strict=True):
        optimizer.step()
        for one in expected:
            one.step()
    assert_equal(ours, theirs)
    assert not any(torch.equal(param, before) for param, before in zip(ours, start, strict=True))


@every_member
@every_dtype
def test_two_runs_are_bitwise_equal(name: str, dtype: torch.dtype) -> None:
    once, again = new_params(dtype), new_params(dtype)
    for params in (once, again):
        optimizer = function(name)(given(params), **keys_of(name))
        for _ in gradients(params, 5):
            optimizer.step()
    assert_equal(once, again)


@every_member
@every_dtype
def test_lowers_a_quadratic(name: str, dtype: torch.dtype) -> None:
    params = new_params(dtype)
    rate = {"lr": RATES.get(name, 0.05), "weight_decay": 0.0}
    optimizer = function(name)(given(params), **keys_of(name) | rate)

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
    optimizer = function(name)(given(straight), **keys_of(name))
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
    optimizer = function(name)(given(resumed), **keys_of(name))
    optimizer.load_state_dict(saved["optimizer"])
    for index, _ in enumerate(gradients(resumed, 6)):
        if index >= 3:
            optimizer.step()
    assert_equal(straight, resumed)


@every_member
def test_the_learning_rate_of_a_group_is_read_at_each_step(name: str) -> None:
    params = new_params(torch.float32)
    optimizer: Optimizer = function(name)(given(params), **keys_of(name))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [param.detach().clone() for param in params]
    for _ in gradients(params, 2):
        optimizer.step()
    assert_equal(params, [nn.Parameter(tensor) for tensor in before])


@every_member
def test_lora_plus_and_parts_without_decay_make_groups(name: str) -> None:
    first, second, third = new_params(torch.float32)
    params = [Trained("a", third, "A"), Trained("n", second, "norms"), Trained("b", first, "B")]
    keys = keys_of(name) | {"lr": 0.5, "weight_decay": 0.25, "loraplus_lr_ratio": 8.0, "no_decay": ["norms"]}
    optimizer = function(name)(params, **keys)
    found = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert found == {third: (0.5, 0.25), second: (4.0, 0.0), first: (4.0, 0.25)}
    assert optimizer.param_groups[0]["lr"] == 0.5  # the one that metrics show


@pytest.mark.parametrize("name", [name for name in MEMBERS if "8bit" in name])
@every_dtype
def test_8bit_state_is_8_bits_where_it_should_be(name: str, dtype: torch.dtype) -> None:
    params = new_params(dtype)
    optimizer = function(name)(given(params), **keys_of(name))
    for _ in gradients(params, 1):
        optimizer.step()
    moments = [[key for key in ("state1", "state2") if key in optimizer.state[param]] for param in params]
    dtypes = [{optimizer.state[param][key].dtype for key in keys} for param, keys in zip(params, moments, strict=True)]
    assert dtypes == [{torch.uint8}, {torch.float32}, {torch.float32}]


@pytest.mark.parametrize(("name", "tolerance"), [("paged_adamw", 1e-6), ("adamw8bit", 2e-2), ("paged_adamw8bit", 2e-2)])
def test_bitsandbytes_adamw_is_adamw(name: str, tolerance: float) -> None:
    """Against PyTorch's, fp32, weights of size 1 after 20 steps of 0.01.

    32-bit state differs by rounding only. 8-bit state rounds each moment to 256 levels at each step, which turns single
    updates by up to a few tenths of the learning rate; 20 of them stay within twice the learning rate.
    """
    keys = {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = new_params(torch.float32), new_params(torch.float32)
    optimizer = function(name)(given(ours), **keys_of(name) | keys)
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
        optimizer = function(name)(given(params), **keys_of(name))
        for _ in gradients(params, 2):
            optimizer.step()
    assert [str(warning.message) for warning in caught] == [
        "optimizer: nothing is paged on a CPU; the optimizer computes the same with its state in ordinary memory"
    ]


BETAS = [(name, key) for name in MEMBERS for key in ("betas", "adamw_betas") if key in MEMBERS[name]]


@pytest.mark.parametrize(("name", "key"), BETAS)
@pytest.mark.parametrize("wrong", ["too few", "too many", "one", "negative"])
def test_impossible_betas_are_refused(name: str, key: str, wrong: str) -> None:
    first, *others = MEMBERS[name][key]
    betas = {"too few": others, "too many": [first, *others, 0.9], "one": [*others, 1.0], "negative": [-0.1, *others]}
    number = {2: "two", 3: "three"}[1 + len(others)]
    with pytest.raises(ConfigError, match=rf"optimizer\.{key}=.*must be {number} numbers, each >= 0 and < 1"):
        function(name)(given(new_params(torch.float32)), **keys_of(name) | {key: betas[wrong]})


def test_adafactor_wants_the_least_size_of_a_parameter() -> None:
    for eps in ([None], [1e-3, None], [None, 1e-3, 1e-3]):
        with pytest.raises(ConfigError, match=r"optimizer\.eps=.*must be two values, the second a number"):
            function("adafactor")(given(new_params(torch.float32)), **keys_of("adafactor") | {"eps": eps})


@pytest.mark.parametrize("name", ["ademamix8bit", "paged_ademamix8bit"])
@pytest.mark.parametrize("betas", [[0.0, 0.999, 0.9999], [0.9, 0.999, 0.0]])
def test_a_slow_average_that_cannot_become_slow_is_refused(name: str, betas: list[float]) -> None:
    changes = {"betas": betas, "t_beta3": 10}
    with pytest.raises(ConfigError, match=r"optimizer\.t_beta3=10 optimizer\.betas=.*: no way from or to a rate of 0"):
        function(name)(given(new_params(torch.float32)), **keys_of(name) | changes)


@pytest.mark.parametrize("name", ["ademamix8bit", "paged_ademamix8bit"])
@every_dtype
def test_ademamix_resumes_in_the_midst_of_its_warm_up(name: str, dtype: torch.dtype) -> None:
    """Both averages of the gradient are one tensor, of which bitsandbytes' own loading keeps dtype and shape."""
    keys = keys_of(name) | {"t_alpha": 5, "t_beta3": 5}
    straight, resumed = new_params(dtype), new_params(dtype)
    first, second = (function(name)(given(params), **keys) for params in (straight, resumed))
    for index, _ in enumerate(gradients(straight, 7)):
        first.step()
        if index == 2:
            state = copy.deepcopy(first.state_dict())
            copies = [param.detach().clone() for param in straight]
    for param, value in zip(resumed, copies, strict=True):
        param.data.copy_(value)
    second.load_state_dict(state)
    shapes = [second.state[param]["state1"].shape for param in resumed]
    assert shapes == [(2, *param.shape) for param in resumed]
    for index, _ in enumerate(gradients(resumed, 7)):
        if index > 2:
            second.step()
    assert_equal(straight, resumed)
    for one, other in zip(straight, resumed, strict=True):
        for key, value in first.state[one].items():
            assert torch.equal(value, second.state[other][key]) if isinstance(value, Tensor) else True


@pytest.mark.parametrize("name", [name for name in MEMBERS if name.startswith("paged")])
def test_loaded_state_is_paged_again_in_the_shape_it_has(name: str) -> None:
    """On the meta device, which is no CPU; CUDA's paged memory is stood in for, and tests/gpu has the real one."""
    large, small = (nn.Parameter(torch.empty(shape, device="meta")) for shape in ((400, 300), (400, 200)))
    optimizer = function(name)(given([large, small]), **keys_of(name))
    shapes = [(2, 400, 300) if "ademamix" in name else (400, 300), (400, 300)][: 1 if "lion" in name else 2]
    saved = optimizer.state_dict()
    state = {f"state{n + 1}": torch.empty(shape, dtype=torch.uint8) for n, shape in enumerate(shapes)}
    saved["state"] = {0: {"step": 1, **state}, 1: {"step": 1, "state1": torch.empty(400, 200, dtype=torch.uint8)}}
    asked: list[tuple[int, ...]] = []

    def buffer(like: Tensor, dtype: torch.dtype) -> Tensor:
        asked.append(tuple(like.shape))
        return torch.empty_like(like, dtype=dtype)

    optimizer.get_state_buffer = buffer
    optimizer.load_state_dict(saved)
    assert asked == shapes
    assert [tuple(optimizer.state[large][moment].shape) for moment in state] == shapes


def test_a_large_matrix_is_stepped_by_paged_ademamix_on_a_cpu() -> None:
    """bitsandbytes would ask for CUDA memory, from 100 000 elements on."""
    ours, theirs = ([nn.Parameter(torch.ones(400, 300))] for _ in range(2))
    optimizers = [function("paged_ademamix8bit")(given(ours), **keys_of("paged_ademamix8bit"))]
    optimizers += [function("ademamix8bit")(given(theirs), **keys_of("ademamix8bit"))]
    for _ in zip(gradients(ours, 2), gradients(theirs, 2), strict=True):
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(ours, theirs)
    assert not torch.equal(ours[0], torch.ones(400, 300))


def test_muon_has_the_matrices_of_blocks_and_adapters_and_adamw_the_rest() -> None:
    roles = ("embeddings", "head", "norms", "biases", "vectors", "B", "A", "matrices")
    shapes = {role: (6,) if role in ("norms", "biases", "vectors") else (6, 4) for role in roles}
    params = [Trained(role, nn.Parameter(torch.ones(shapes[role])), role) for role in roles]
    optimizer = function("muon")(params, **keys_of("muon") | {"lr": 0.5, "adamw_lr": 0.25})
    names = {id(one.param): one.name for one in params}
    found = [([names[id(p)] for p in group["params"]], group["lr"]) for group in optimizer.param_groups]
    assert found == [(["B", "A", "matrices"], 0.5), (["embeddings", "head", "norms", "biases", "vectors"], 0.25)]


def test_muon_without_a_matrix_or_without_anything_else() -> None:
    matrix, vector, other = new_params(torch.float32)
    alone = function("muon")([Trained("A", matrix, "A"), Trained("B", other, "B")], **keys_of("muon"))
    assert len(alone.param_groups) == 1
    for _ in gradients([matrix, other], 1):
        alone.step()
    assert not torch.equal(matrix, new_params(torch.float32)[0])
    with pytest.raises(ConfigError, match=r"optimizer=muon: no matrix .* trains; say optimizer=adamw"):
        function("muon")([Trained("norm", vector, "norms")], **keys_of("muon"))


def test_muon_takes_a_closure_and_loads_no_state_of_another() -> None:
    params = new_params(torch.float32)
    optimizer = function("muon")(given(params), **keys_of("muon"))
    for _ in gradients(params, 1):
        assert optimizer.step(lambda: 3.0) == 3.0
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(function("adamw")(given(params), **keys_of("adamw")).state_dict())


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.nesterov=true needs momentum"):
        function("sgd")(given(new_params(torch.float32)), **keys_of("sgd") | {"momentum": 0.0, "nesterov": True})
