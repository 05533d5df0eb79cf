"""Schedules: the values by hand at the edges, and those of transformers everywhere else."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tuner.schedules.constant import Constant
from tuner.schedules.cosine import Cosine
from tuner.schedules.linear import Linear

CONF = Path(__file__).parents[2] / "conf" / "schedule"
MEMBERS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml"))}


def build(name: str, **changes: Any) -> Any:
    keys = {key: value for key, value in (MEMBERS[name] | changes).items() if not key.startswith("_")}
    module, _, attribute = MEMBERS[name]["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), attribute)(**keys)


def transformers_lambda(make: Any, *args: Any, **kwargs: Any) -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return make(optimizer, *args, **kwargs).lr_lambdas[0]


def test_all_members_are_found() -> None:
    assert set(MEMBERS) >= {"constant", "cosine", "linear"}


@pytest.mark.parametrize("name", MEMBERS)
class TestEveryMember:
    def test_the_yaml_lists_exactly_the_signature(self, name: str) -> None:
        parameters = inspect.signature(type(build(name))).parameters
        assert [key for key in MEMBERS[name] if not key.startswith("_")] == list(parameters)
        assert all(parameter.default is inspect.Parameter.empty for parameter in parameters.values())

    @pytest.mark.parametrize("warmup_steps", [0, 1, 7])
    def test_every_step_of_a_run_changes_something(self, name: str, warmup_steps: int) -> None:
        schedule = build(name, warmup_steps=warmup_steps)
        factors = [schedule.factor(step, 20) for step in range(20)]
        assert all(0.0 < factor <= 1.0 for factor in factors)
        assert max(factors) == 1.0

    def test_warm_up_climbs_by_equal_steps_to_the_full_rate(self, name: str) -> None:
        schedule = build(name, warmup_steps=4)
        assert [schedule.factor(step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]

    def test_never_rises_after_warm_up(self, name: str) -> None:
        schedule = build(name, warmup_steps=3)
        factors = [schedule.factor(step, 50) for step in range(3, 60)]
        assert factors == sorted(factors, reverse=True)

    def test_a_run_shorter_than_its_warm_up_only_climbs(self, name: str) -> None:
        schedule = build(name, warmup_steps=10)
        assert [schedule.factor(step, 5) for step in range(5)] == [0.1, 0.2, 0.3, 0.4, 0.5]

    def test_depends_on_nothing_but_the_step(self, name: str) -> None:
        forwards, backwards = build(name), build(name)
        there = [forwards.factor(step, 30) for step in range(30)]
        back = [backwards.factor(step, 30) for step in reversed(range(30))]
        assert there == back[::-1]


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 1), (0, 10), (1, 10), (7, 60), (100, 1000), (9, 10)])
class TestAgainstTransformers:
    """After warm-up the factors are theirs; during warm-up ours are theirs of one step later (see `warmup`)."""

    def compare(self, ours: Any, theirs: Any, warmup_steps: int, total_steps: int) -> None:
        for step in range(total_steps):
            expected = theirs(step + 1) if step < warmup_steps - 1 else theirs(max(step, warmup_steps))
            # Same formula in double precision; the order of operations may differ by one rounding.
            assert ours.factor(step, total_steps) == pytest.approx(expected, rel=1e-12, abs=1e-15), step

    def test_cosine(self, warmup_steps: int, total_steps: int) -> None:
        from transformers.optimization import get_cosine_schedule_with_warmup

        theirs = transformers_lambda(get_cosine_schedule_with_warmup, warmup_steps, total_steps)
        self.compare(Cosine(warmup_steps, 0.0, 0.0), theirs, warmup_steps, total_steps)

    def test_cosine_to_a_floor(self, warmup_steps: int, total_steps: int) -> None:
        from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

        theirs = transformers_lambda(
            get_cosine_with_min_lr_schedule_with_warmup, warmup_steps, total_steps, min_lr_rate=0.1
        )
        self.compare(Cosine(warmup_steps, 0.0, 0.1), theirs, warmup_steps, total_steps)

    def test_linear(self, warmup_steps: int, total_steps: int) -> None:
        from transformers.optimization import get_linear_schedule_with_warmup

        theirs = transformers_lambda(get_linear_schedule_with_warmup, warmup_steps, total_steps)
        self.compare(Linear(warmup_steps, 0.0, 0.0), theirs, warmup_steps, total_steps)

    def test_constant(self, warmup_steps: int, total_steps: int) -> None:
        from transformers.optimization import get_constant_schedule_with_warmup

        theirs = transformers_lambda(get_constant_schedule_with_warmup, warmup_steps)
        self.compare(Constant(warmup_steps, 0.0), theirs, warmup_steps, total_steps)


@pytest.mark.parametrize("schedule", [Cosine(2, 0.0, 0.25), Linear(2, 0.0, 0.25)])
def test_the_floor_is_reached_one_past_the_last_step_and_kept(schedule: Any) -> None:
    assert schedule.factor(9, 10) > 0.25
    assert schedule.factor(10, 10) == pytest.approx(0.25, abs=1e-15)
    assert schedule.factor(1000, 10) == pytest.approx(0.25, abs=1e-15)


def test_linear_to_a_floor_by_hand() -> None:
    assert [Linear(0, 0.0, 0.5).factor(step, 4) for step in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize(("total_steps", "expected"), [(1, 1), (10, 1), (11, 2), (60, 6)])
def test_without_steps_the_warm_up_is_a_share_of_the_run(name: str, total_steps: int, expected: int) -> None:
    by_ratio, by_steps = build(name, warmup_steps=None, warmup_ratio=0.1), build(name, warmup_steps=expected)
    steps = range(total_steps)
    assert [by_ratio.factor(i, total_steps) for i in steps] == [by_steps.factor(i, total_steps) for i in steps]
