"""Optimizers named by their class."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tuner.build import build_optimizer
from tuner.config import check, compose
from tuner.errors import ConfigError
from tuner.optimizers.custom import custom, find
from tuner.optimizers.groups import Trained
from tuner.quiet import import_bitsandbytes


def new_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(80, 64, generator=generator))]


def given(params: list[nn.Parameter]) -> list[Trained]:
    """As an optimizer of ours takes them."""
    return [Trained(str(number), param, "matrices") for number, param in enumerate(params)]


@pytest.mark.parametrize(
    ("target", "keys"),
    [
        ("torch.optim.RAdam", {"lr": 0.01, "eps": 1e-7, "betas": [0.8, 0.9]}),
        ("torch.optim.Adafactor", {"lr": 0.01}),
        ("torch.optim.NAdam", {"lr": 0.01, "momentum_decay": 1e-3}),
        ("bitsandbytes.optim.Lion8bit", {"lr": 0.01}),
        ("bitsandbytes.optim.AdEMAMix", {"lr": 0.01, "betas": [0.9, 0.999, 0.9999]}),
        ("bitsandbytes.optim.PagedLion", {"lr": 0.01}),
    ],
)
def test_equals_the_class_itself(target: str, keys: dict[str, Any]) -> None:
    module, _, name = target.rpartition(".")
    import_bitsandbytes()
    ours, theirs = new_params(), new_params()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = custom(target, given(ours), keys, [])
        reference = getattr(importlib.import_module(module), name)(theirs, **keys)
        assert type(optimizer) is type(reference)
        for step in range(4):
            for param in (*ours, *theirs):
                param.grad = torch.full_like(param, 0.1 * (step + 1)) * param.detach().sign()
            optimizer.step()
            reference.step()
    assert torch.equal(ours[0], theirs[0])
    assert not torch.equal(ours[0], new_params()[0])


def test_a_paged_class_says_that_a_cpu_does_not_page() -> None:
    with pytest.warns(UserWarning, match="optimizer: nothing is paged on a CPU"):
        custom("bitsandbytes.optim.PagedLion", given(new_params()), {"lr": 0.01}, [])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.optim.RAdm", r"torch\.optim has no such optimizer; did you mean RAdam"),
        ("torch.optim.Optimizer", "no such optimizer"),
        ("bitsandbytes.optim.Lyon", "did you mean Lion"),
        ("bitsandbytes.optim.GlobalOptimManager", "no such optimizer"),
        ("os.system", r"must be a class of torch\.optim or bitsandbytes\.optim"),
        ("torch.optim.lr_scheduler.StepLR", r"must be a class of torch\.optim or bitsandbytes\.optim"),
        ("RAdam", r"must be a class of torch\.optim or bitsandbytes\.optim"),
        ("torch.optim.LBFGS", "evaluates the loss several times a step"),
    ],
)
def test_what_cannot_be_an_optimizer_here_is_refused(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        find(target, [])
    assert caught.value.problems[0].startswith(f"optimizer._target_={target}: ")


def test_keys_the_class_does_not_take_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        custom("torch.optim.RAdam", given(new_params()), {"lr": 0.01, "fused": True, "epsilon": 1e-8}, [])
    fused, epsilon = caught.value.problems
    assert fused.startswith("optimizer.fused=True: torch.optim.RAdam has no such argument (~optimizer.fused takes")
    assert epsilon.startswith("optimizer.epsilon=1e-08: ")
    assert (
        "valid: betas, capturable, decoupled_weight_decay, differentiable, eps, foreach, loraplus_lr_ratio" in epsilon
    )


def test_groups_are_made_for_any_class_that_can_have_them() -> None:
    params = [Trained("a", *new_params(), "A"), Trained("b", *new_params(), "B"), Trained("n", *new_params(), "norms")]
    keys = {"lr": 0.5, "weight_decay": 0.1, "loraplus_lr_ratio": 4.0, "no_decay": ["norms"]}
    optimizer = custom("torch.optim.RAdam", params, keys, [])
    found = [(group["params"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [([params[0].param], 0.5, 0.1), ([params[2].param], 0.5, 0.0), ([params[1].param], 2.0, 0.1)]
    with pytest.raises(ConfigError, match=r"optimizer\.no_decay=\['norms'\]: torch\.optim\.Rprop has no weight_decay"):
        custom("torch.optim.Rprop", params, {"lr": 0.5, "no_decay": ["norms"]}, [])
    assert len(custom("torch.optim.Rprop", params, {"lr": 0.5, "no_decay": []}, []).param_groups) == 1


def test_fused_sgd_that_would_not_train_is_refused() -> None:
    keys = {"lr": 0.1, "fused": True}
    custom("torch.optim.SGD", given(new_params()), keys, [])
    with pytest.raises(
        ConfigError, match=r"optimizer\.fused=true: on a CPU, PyTorch's fused SGD skips bf16 parameters"
    ):
        custom("torch.optim.SGD", given([nn.Parameter(new_params()[0].bfloat16())]), keys, [])


def test_a_value_the_class_refuses_is_one_clear_line() -> None:
    with pytest.raises(ConfigError) as caught:
        custom("torch.optim.RAdam", given(new_params()), {"lr": -1.0}, [])
    assert caught.value.problems == [
        "optimizer._target_=torch.optim.RAdam refuses its keys: Invalid learning rate: -1.0"
    ]


@pytest.fixture
def my_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of the person's own with an optimizer in it."""
    name = f"my_package_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "optimizers.py").write_text("import torch\n\nclass Mine(torch.optim.SGD):\n    pass\n")
    (tmp_path / name / "broken.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


@pytest.mark.parametrize("prefix", ["{}", "{}.", "{}.optimizers"])
def test_a_class_of_a_trusted_package_is_built_as_the_configuration_says(my_package: str, prefix: str) -> None:
    words = ["optimizer=custom", f"optimizer._target_={my_package}.optimizers.Mine", "optimizer.lr=0.5"]
    cfg = compose([*words, f"trust_targets=[{prefix.format(my_package)}]"])
    check(cfg)
    optimizer = build_optimizer(cfg.optimizer, given(new_params()), cfg.trust_targets)
    assert type(optimizer).__qualname__ == "Mine"
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_what_is_not_trusted_is_not_even_imported(my_package: str) -> None:
    for trusted in ([], [""], ["my"], [my_package[:-1]], [f"{my_package}.other"]):
        with pytest.raises(ConfigError, match="or of a package that trust_targets names"):
            find(f"{my_package}.optimizers.Mine", trusted)
    assert my_package not in sys.modules


def test_a_trusted_name_that_is_not_there_is_one_clear_line(my_package: str) -> None:
    with pytest.raises(ConfigError, match="has no such optimizer; did you mean Mine"):
        find(f"{my_package}.optimizers.Mien", [my_package])
    with pytest.raises(ConfigError, match=f"there is no module {my_package}.optimisers to import it from"):
        find(f"{my_package}.optimisers.Mine", [my_package])
    with pytest.raises(ConfigError, match="there is no module not_installed to import it from"):
        find("not_installed.optimizers.Mine", ["not_installed"])
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        find(f"{my_package}.broken.Mine", [my_package])
