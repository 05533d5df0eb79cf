"""Scaling of the loss: `torch.amp.GradScaler`'s rule, gradients as they are without it, and steps that overflow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.build import compute_in, load_base
from tuner.data.batches import Batches
from tuner.data.order import Shuffled
from tuner.errors import TrainingError
from tuner.loop import Step, add_gradients, training_steps
from tuner.loss import sum_cross_entropy
from tuner.loss_scale import LossScale
from tuner.models.decoder import Decoder
from tuner.models.llama import LlamaConfig
from tuner.precision.amp_fp16 import amp_fp16
from tuner.types import Sample, State

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CPU = torch.device("cpu")


class Flat:
    def factor(self, step: int, total_steps: int) -> float:
        return 1.0


@pytest.mark.parametrize("seed", range(4))
def test_it_moves_as_pytorchs_does(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    overflows = (torch.rand(200, generator=generator) < 0.15).tolist()
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=5)
    ours = LossScale(2.0**30, growth_interval=5)
    seen = set()
    for overflowed in overflows:
        theirs.scale(parameter.sum()).backward()
        assert parameter.grad is not None
        if overflowed:
            parameter.grad[1] = torch.inf
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.count(overflowed=overflowed)
        assert ours.value == theirs.get_scale()
        assert ours.good_steps == theirs.state_dict()["_growth_tracker"]
        seen.add(ours.value)
    assert len(seen) > 5


def half_llama() -> Decoder:
    """All its fp32 weights train, and it computes in float16."""
    model = load_base(LlamaConfig.from_hugging_face(SHAPE, None), torch.float32, CPU, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    compute_in(model, amp_fp16("auto", 65536.0, 2000))
    return model.requires_grad_(True).train()


def half_state(scale: float, growth_interval: int = 2000) -> State:
    """Two windows an epoch of three batches of two."""
    model = half_llama()
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 61, (length,), generator=generator).tolist() for length in range(5, 17)]
    order = Shuffled([len(row) for row in rows], seed=5, fingerprint="f")
    batches = Batches([Sample(row, row) for row in rows], order, batch_size=2, accumulation=3, pad_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return State(model, optimizer, batches, loss_scale=LossScale(scale, growth_interval))


def steps(state: State, number: int, **keys: Any) -> list[Step]:
    given: dict[str, Any] = {"clip_grad_norm": 1.0, "device": CPU, **keys}
    return list(islice(training_steps(state, Flat(), total_steps=100, **given), number))


def off(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    a, b = (torch.cat([x.flatten().double() for x in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm())


def gradients(model: Decoder, weight: float, scale: float) -> list[Tensor]:
    """Of a window's loss times `weight`, so that all of them are small."""
    tokens = torch.randint(0, 61, (4, 20), generator=torch.Generator().manual_seed(1))
    loss = sum_cross_entropy(model.hidden(tokens), tokens, model.lm_head, None, weight * scale)
    loss.backward()  # type: ignore[no-untyped-call]
    found = [p.grad.double() / (weight * scale) for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def test_small_gradients_vanish_without_it_and_not_with_it() -> None:
    """float16 has 11 bits of mantissa: some ten roundings of 2^-11 are 0.5 %."""
    exact_model = half_llama().float()
    exact_model.compute_in(torch.float32)
    exact = gradients(exact_model, 1.0, 1.0)
    model = half_llama()
    assert off(gradients(model, 1.0, 1.0), exact) < 0.01
    assert off(gradients(model, 2.0**-20, 1.0), exact) > 0.1
    assert off(gradients(model, 2.0**-20, 2.0**20), exact) < 0.01


def test_the_norm_and_the_step_are_those_of_unscaled_gradients() -> None:
    """Scaling by powers of two rounds nothing but what would have been too small."""
    found = []
    for scale in (64.0, 1024.0):
        state = half_state(scale)
        (step,) = steps(state, 1)
        assert (step.skipped, step.loss_scale) == (None, scale)
        found.append((step, [p.detach().clone() for p in state.model.parameters()]))
    (low, low_weights), (high, high_weights) = found
    assert high.loss == low.loss
    assert high.grad_norm == pytest.approx(low.grad_norm, rel=1e-3)
    assert 0.1 < high.grad_norm < 100
    start = [p.detach().clone() for p in half_llama().parameters()]
    moved = [[a - b for a, b in zip(weights, start, strict=True)] for weights in (low_weights, high_weights)]
    assert off(*moved) < 0.05  # Adam makes whole steps of gradients that are all rounding


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_step_that_overflows_is_skipped_and_counted_and_lowers_the_scale(on_nonfinite: str) -> None:
    state = half_state(2.0**40)
    before = [p.detach().clone() for p in state.model.parameters()]
    done = steps(state, 1, on_nonfinite=on_nonfinite)
    while done[-1].skipped is not None:
        number, scale = len(done), 2.0 ** (41 - len(done))
        assert done[-1].loss_scale == scale
        assert done[-1].skipped == (
            f"step {number}: gradients overflow float16 with the loss scaled by {scale:g}, not stepped; from here on "
            f"it is scaled by {scale / 2:g}, as is usual in the first steps"
        )
        assert math.isfinite(done[-1].loss)
        assert all(map(torch.equal, state.model.parameters(), before))
        assert not state.optimizer.state
        done += steps(state, 1, on_nonfinite=on_nonfinite)
    assert len(done) > 5
    assert state.skipped_steps == len(done) - 1
    assert state.step == len(done)
    assert state.loss_scale is not None
    assert state.loss_scale.value == done[-1].loss_scale
    assert state.loss_scale.good_steps == 1
    assert not any(map(torch.equal, state.model.parameters(), before))


def test_good_steps_raise_the_scale() -> None:
    scales = [step.loss_scale for step in steps(half_state(16.0, growth_interval=2), 6)]
    assert scales == [16.0, 16.0, 32.0, 32.0, 64.0, 64.0]


def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale() -> None:
    state = half_state(1024.0)
    with torch.no_grad():
        state.model.model.norm.weight[0] = torch.inf  # type: ignore[union-attr, operator, index]
    with pytest.raises(TrainingError, match=r"step 1: loss nan.*not finite, not stepped; samples"):
        steps(state, 1)
    assert state.loss_scale == LossScale(1024.0, 2000)


def test_a_gradient_that_is_infinite_at_any_scale_stops_the_run() -> None:
    state = half_state(4.0)
    norm: nn.Parameter = state.model.model.norm.weight  # type: ignore[union-attr, assignment]
    norm.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))  # type: ignore[no-untyped-call]
    with pytest.raises(TrainingError, match=r"step 3: .*gradient norm (inf|nan): not finite"):
        steps(state, 9)
    assert state.skipped_steps == 2
    assert state.loss_scale is not None
    assert state.loss_scale.value == 1.0


def test_a_window_in_pieces_gives_the_gradients_of_the_whole() -> None:
    state = half_state(256.0)
    window = next(state.batches)
    pieces = add_gradients(state.model, window, 256.0)
    found = [p.grad.clone() / 256 for p in state.model.parameters() if p.grad is not None]
    state.model.zero_grad()
    expected_pieces = add_gradients(state.model, window)
    expected = [p.grad for p in state.model.parameters() if p.grad is not None]
    assert [float(piece) for piece in pieces] == pytest.approx([float(piece) for piece in expected_pieces], rel=1e-6)
    assert off(found, expected) < 0.01
