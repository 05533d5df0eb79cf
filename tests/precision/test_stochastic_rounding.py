"""Stochastic rounding: right on average, one of the two neighbours, the same from the same seed and step."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.checkpoint.snapshot import load_exactly
from tuner.optimizers.adam8bit import adam8bit
from tuner.optimizers.adamw import adamw
from tuner.optimizers.adamw8bit import adamw8bit
from tuner.optimizers.custom import custom
from tuner.optimizers.groups import Trained
from tuner.optimizers.sgd import sgd
from tuner.precision import stochastic_rounding
from tuner.precision.stochastic_rounding import key_of, random_bits, round_stochastically, round_updates
from tuner.types import State

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"loraplus_lr_ratio": None, "no_decay": []}
ADAM: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.01, **PLAIN}
SGD: dict[str, Any] = {"lr": 1e-2, "momentum": 0.9, "nesterov": False, "weight_decay": 0.01, **PLAIN}
OPTIMIZERS: dict[str, Callable[[Sequence[Trained]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: adamw(parameters, **ADAM, fused=True),
    "adamw8bit": lambda parameters: adamw8bit(parameters, **ADAM, min_8bit_size=256),
    "adam8bit": lambda parameters: adam8bit(parameters, **ADAM, min_8bit_size=256),
    "sgd": lambda parameters: sgd(parameters, **SGD),
    "radam": lambda parameters: custom("torch.optim.RAdam", parameters, {"lr": 1e-3}, []),
    "nadam": lambda parameters: custom("torch.optim.NAdam", parameters, {"lr": 1e-3}, []),
}


def optimizer_of(name: str, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return OPTIMIZERS[name]([Trained(str(number), param, "matrices") for number, param in enumerate(params)])


def rounded(exact: Tensor, key: int) -> Tensor:
    out = torch.empty_like(exact, dtype=torch.bfloat16)
    round_stochastically(exact.clone(), key, out)
    return out.float()


def neighbours(exact: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers next to each value, nearer to zero and further from it; both itself where it is one."""
    bits = exact.view(torch.int32)
    inner = bits.bitwise_and(~0xFFFF)
    outer = torch.where(inner == bits, inner, inner + 0x10000)
    return inner.view(torch.float32), outer.view(torch.float32)


def values() -> Tensor:
    """Of all magnitudes and signs, some just below a power of two, some too small for a normal number."""
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(400, generator=generator) * 10.0 ** torch.randint(-30, 30, (400,), generator=generator)
    below = 2.0 ** torch.arange(-20, 20).float() * (1 - 2.0**-20)
    return torch.cat([ordinary, below, -below, torch.tensor([1e-39, -3e-40, 1e-45])])


def test_the_mean_of_many_roundings_is_the_value() -> None:
    """Within five standard errors of a mean of `draws` choices between two neighbours, for each of 483 values."""
    exact, draws = values(), 4000
    inner, outer = (x.double() for x in neighbours(exact))
    mean = torch.stack([rounded(exact, key_of(1, step, 0)) for step in range(draws)]).double().mean(0)
    spacing = outer - inner
    share = torch.where(spacing != 0, (exact.double() - inner) / spacing, torch.zeros_like(spacing))
    standard_error = (spacing.abs() * (share * (1 - share) / draws).sqrt()).clamp_min(1e-300)
    off = (mean - exact.double()).abs() / standard_error
    # A neighbour that is expected less than ten times is not drawn by a normal distribution.
    common = share.minimum(1 - share) * draws > 10
    assert common.sum() > 350
    assert off[common].max() <= 5
    assert ((mean - exact.double()).abs() <= spacing.abs() * 40 / draws)[~common].all()


def test_it_is_one_of_the_two_neighbours() -> None:
    exact = values()
    inner, outer = neighbours(exact)
    for step in range(50):
        found = rounded(exact, key_of(2, step, 0))
        assert ((found == inner) | (found == outer)).all()
    assert exact.to(torch.bfloat16).float().sub(inner).mul(exact.to(torch.bfloat16).float() - outer).eq(0).all()


def test_what_is_bfloat16_already_stays() -> None:
    special = [0.0, -0.0, float("inf"), -float("inf"), 3.3895e38, 1.0]
    exact = torch.cat([values(), torch.tensor(special)]).to(torch.bfloat16)
    for step in range(20):
        found = rounded(exact.float(), key_of(3, step, 0))
        assert torch.equal(found.view(torch.int32), exact.float().view(torch.int32))  # the sign of zero too
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert rounded(nan, 0).isnan().all()


def test_the_bits_are_splitmix64_and_uniform() -> None:
    def split_mix(counter: int, key: int) -> list[int]:
        z = (counter * 0x9E3779B97F4A7C15 + key) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        return [z >> 16 * i & 0xFFFF for i in range(4)]

    key = key_of(7, 8, 9)
    expected = [number for counter in range(25) for number in split_mix(counter, key)]
    assert random_bits(0, 99, key, CPU).tolist() == expected[:99]
    assert random_bits(40, 20, key, CPU).tolist() == expected[40:60]
    many = random_bits(0, 2**18, key, CPU).double() / 65535
    assert float(many.mean()) == pytest.approx(0.5, abs=5 * 12**-0.5 / 2**9)
    for other in (key_of(7, 8, 10), key_of(7, 9, 9), key_of(8, 8, 9)):
        both = torch.stack([many, random_bits(0, 2**18, other, CPU).double()])
        assert abs(float(torch.corrcoef(both)[0, 1])) <= 5 / 2**9


@pytest.mark.parametrize(("threads", "chunk"), [(1, 64), (3, 2**18), (2, 1000)])
def test_neither_threads_nor_chunks_change_a_bit(threads: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.randn(70_001, generator=torch.Generator().manual_seed(4))
    expected = rounded(exact, 5)
    before = torch.get_num_threads()
    monkeypatch.setitem(stochastic_rounding.CHUNK, "cpu", chunk)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(rounded(exact, 5), expected)
    finally:
        torch.set_num_threads(before)


def parameters() -> list[nn.Parameter]:
    """Of bfloat16; the last has no gradient, as a layer that a step does not reach."""
    generator = torch.Generator().manual_seed(6)
    shapes = [(96, 48), (33,), (5, 7), (4,)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(torch.bfloat16)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in params[:-1]:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16).to(parameter.dtype)


def state_of(name: str, params: list[nn.Parameter], step: int = 0, seed: int = 11) -> State:
    state = State(nn.Module(), optimizer_of(name, params), None, step=step)  # type: ignore[arg-type]
    round_updates(state, seed)
    return state


def stepped(state: State, params: list[nn.Parameter], until: int) -> list[Tensor]:
    while state.step < until:
        give_gradients(params, state.step)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
    return [parameter.detach().clone() for parameter in params]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_optimizers_step_in_fp32_rounded(name: str) -> None:
    ours, exact = parameters(), [nn.Parameter(parameter.detach().float()) for parameter in parameters()]
    state, twin = state_of(name, ours), optimizer_of(name, exact)
    for step in range(4):
        places = [parameter.data_ptr() for parameter in ours]
        give_gradients(exact, step)
        twin.step()
        found = stepped(state, ours, step + 1)
        for index, (parameter, true) in enumerate(zip(found, exact, strict=True)):
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(parameter.float(), rounded(true.detach(), key_of(11, step, index)))
            true.data.copy_(parameter)  # the next step starts from what was rounded
        assert places == [parameter.data_ptr() for parameter in ours]  # what shares their memory sees the change
    assert torch.equal(found[-1], parameters()[-1])
    assert not torch.equal(found[0], parameters()[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_continued_from_its_state_it_ends_bit_for_bit_the_same(name: str) -> None:
    whole = parameters()
    expected = stepped(state_of(name, whole), whole, 6)
    first = parameters()
    state = state_of(name, first)
    stepped(state, first, 3)
    file = io.BytesIO()
    torch.save(state.optimizer.state_dict(), file)
    file.seek(0)
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    continued = state_of(name, second, step=3)
    load_exactly(continued.optimizer, torch.load(file, weights_only=True))
    assert {parameter.dtype for parameter in second} == {torch.bfloat16}
    moments = [value for entry in continued.optimizer.state.values() for value in entry.values()]
    assert {x.dtype for x in moments if isinstance(x, Tensor)} <= {torch.float32, torch.uint8, torch.int64}
    assert all(map(torch.equal, stepped(continued, second, 6), expected))
    other = parameters()
    assert not all(map(torch.equal, stepped(state_of(name, other, seed=12), other, 6), expected))


def test_one_parameter_at_a_time_is_in_fp32() -> None:
    seen: list[list[tuple[torch.dtype, bool]]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            group = self.param_groups[0]["params"]
            seen.append([(p.dtype, p.grad is not None) for p in group])
            assert all(p.grad is None or p.grad.dtype == p.dtype for p in group)
            super().step(closure)

    params = parameters()
    state = State(nn.Module(), Watched(params, lr=0.1), None)  # type: ignore[arg-type]
    round_updates(state, 0)
    stepped(state, params, 1)
    plain, copied = (torch.bfloat16, False), (torch.float32, True)
    assert seen == [[copied if place == turn else plain for place in range(4)] for turn in range(3)]


def test_small_updates_add_up_where_nearest_rounding_loses_them() -> None:
    """Steps of 1/64 of the distance between neighbours: rounded to the nearest nothing ever moves."""
    size, steps = 4096, 64
    nearest, ours = (nn.Parameter(torch.full((size,), 1.0, dtype=torch.bfloat16)) for _ in range(2))
    delta = 2.0**-7 / 64
    plain = torch.optim.SGD([nearest], lr=delta)
    state = State(nn.Module(), torch.optim.SGD([ours], lr=delta), None)  # type: ignore[arg-type]
    round_updates(state, 3)
    means = []
    for step in range(steps):
        state.step = step
        for parameter, optimizer in ((nearest, plain), (ours, state.optimizer)):
            parameter.grad = -torch.ones_like(parameter)
            optimizer.step()
        means.append(float(ours.detach().double().mean()))
    assert torch.equal(nearest.detach().float(), torch.ones(size))
    # Each step moves a number by 2^-7 with probability 1/64: standard deviation of the mean after all of them.
    deviation = 2.0**-7 * (steps / 64 * (1 - 1 / 64) / size) ** 0.5
    assert means[-1] == pytest.approx(1 + steps * delta, abs=5 * deviation)
    assert all(later > earlier for earlier, later in pairwise(means))
