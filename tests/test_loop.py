"""The loop: accumulation equals the large batch, clipping, schedules, what is refused, what is counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tuner.build import load_base
from tuner.data.batches import Batches, batches_by_length, collate
from tuner.data.order import Shuffled
from tuner.errors import TrainingError
from tuner.loop import Schedule, Step, backward, evaluate, training_steps
from tuner.loss import sum_cross_entropy
from tuner.models.decoder import Decoder
from tuner.models.llama import LlamaConfig
from tuner.peft.lora import LoRA
from tuner.types import IGNORE, Batch, Sample, State

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


class Falling:
    def factor(self, step: int, total_steps: int) -> float:
        return 1.0 - step / total_steps


def llama(*, dropout: float | None = None, **changed: Any) -> Decoder:
    """All parameters train, or with `dropout` those of a LoRA."""
    model = load_base(LlamaConfig.from_hugging_face({**SHAPE, **changed}, None), torch.float32, CPU, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    model.requires_grad_(True)
    if dropout is not None:
        torch.manual_seed(0)
        LoRA("lora", 4, 8, dropout, ["q_proj", "v_proj"], True, True, False).adapt(model)
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                nn.init.normal_(parameter, std=0.2)
    return model.train()


def samples(number: int, seed: int = 0) -> list[Sample]:
    """Of unequal lengths (2 to 25), the first part of each not trained on."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(number):
        length = int(torch.randint(2, 26, (1,), generator=generator))
        prompt = int(torch.randint(0, length, (1,), generator=generator))
        tokens = torch.randint(0, 61, (length,), generator=generator).tolist()
        made.append(Sample(tokens, [IGNORE] * prompt + tokens[prompt:]))
    return made


def gradients(model: Decoder, window: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
    loss = backward(model, window)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss, found


def windows(size: int) -> list[Batch]:
    """The same eight samples in batches of `size`."""
    return batches_by_length(samples(8), size, pad_id=0)


@pytest.mark.parametrize(("dropout", "tied"), [(None, False), (None, True), (0.0, False)], ids=["full", "tied", "lora"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_accumulated_gradients_are_the_large_batchs(dropout: float | None, tied: bool, size: int) -> None:
    model = llama(dropout=dropout, tie_word_embeddings=tied)
    accumulated = windows(size)
    assert len({batch.num_trained for batch in accumulated}) > 1  # unequal numbers, or a mean of means would pass
    loss, expected = gradients(model, windows(8))
    found_loss, found = gradients(model, accumulated)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4
        assert (found[name] - gradient).abs().max() <= 1e-6, name


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_one_whole_step_of_accumulation_is_the_large_batchs(size: int, clip: float | None) -> None:
    """With an eps of Adam above the rounding of gradients, which it would otherwise blow up to whole steps."""
    after = []
    for batch_size in (8, size):
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
        state = State(model, optimizer, Windows([windows(batch_size)]))
        (step,) = training_steps(state, Flat(), total_steps=1, clip_grad_norm=clip, device=CPU)
        after.append((step, dict(model.named_parameters())))
    (large, expected), (accumulated, found) = after
    assert accumulated.loss == pytest.approx(large.loss, rel=1e-6)
    assert accumulated.grad_norm == pytest.approx(large.grad_norm, rel=1e-5)
    assert accumulated.tokens == large.tokens == sum(len(sample.tokens) for sample in samples(8))
    start = dict(llama().named_parameters())
    for name, parameter in expected.items():
        assert (parameter - start[name]).abs().max() > 1e-4
        assert (found[name] - parameter).abs().max() <= 1e-6, name


class Windows:
    """The given windows, over and over; an epoch each time round."""

    def __init__(self, windows: Sequence[Sequence[Batch]]) -> None:
        self.windows, self.taken = windows, 0

    def __iter__(self) -> Windows:
        return self

    def __next__(self) -> Sequence[Batch]:
        self.taken += 1
        return self.windows[(self.taken - 1) % len(self.windows)]

    @property
    def at_epoch_end(self) -> bool:
        return self.taken > 0 and self.taken % len(self.windows) == 0

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.taken = state["taken"]


def run(
    model: Decoder, steps: int, *, lr: float = 0.1, clip: float | None = None, schedule: Schedule | None = None
) -> list[Step]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    state = State(model, optimizer, Windows([windows(4), windows(2)]))
    return list(training_steps(state, schedule or Flat(), total_steps=steps, clip_grad_norm=clip, device=CPU))


def test_a_step_of_sgd_is_lr_times_the_clipped_gradient() -> None:
    model = llama()
    _, gradient = gradients(model, windows(4))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    clip = norm / 3
    (step,) = run(model, 1, lr=0.5, clip=clip)
    assert step.grad_norm == pytest.approx(norm, rel=1e-5)  # as it was before clipping
    for name, parameter in model.named_parameters():
        assert (start[name] - 0.5 * gradient[name] / 3 - parameter).abs().max() <= 2e-6  # clip_grad_norm_ adds 1e-6


def test_the_learning_rate_follows_the_schedule() -> None:
    model = llama()
    steps = run(model, 4, lr=0.2, schedule=Falling())
    assert [step.lr for step in steps] == pytest.approx([0.2, 0.15, 0.1, 0.05])


def test_state_is_consistent_after_each_step() -> None:
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = State(model, optimizer, Windows([windows(4), windows(2)]))
    a_window = sum(len(sample.tokens) for sample in samples(8))
    for step in training_steps(state, Flat(), total_steps=3, clip_grad_norm=None, device=CPU):
        assert state.step == step.number
        assert state.tokens == step.number * a_window
        assert state.train_loss == step.loss
        assert step.ends_epoch is (step.number == 2)
        assert all(p.grad is None for p in model.parameters())
    assert state.step == 3
    assert state.seconds > 0
    assert list(training_steps(state, Flat(), total_steps=3, clip_grad_norm=None, device=CPU)) == []
    more = list(training_steps(state, Flat(), total_steps=4, clip_grad_norm=None, device=CPU))
    assert [step.number for step in more] == [4]


def test_training_learns_its_samples() -> None:
    model = llama()
    losses = [step.loss for step in run(model, 25, lr=0.3, clip=1.0)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_before_the_step(broken: float) -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[0] = broken
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    said = (
        r"step 1: loss (nan|inf), gradient norm nan: not finite, not stepped; samples [\d, ]*; train.on_nonfinite=skip"
    )
    with pytest.raises(TrainingError, match=said):
        run(model, 1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def only_once(given: Sequence[Sample]) -> tuple[int, int]:
    """A token that stands in one sample alone and before what is trained on there, and which sample that is."""
    for token in range(61):
        owners = [number for number, sample in enumerate(given) if token in sample.tokens]
        last = given[owners[0]].labels[-1] if owners else IGNORE
        if len(owners) == 1 and last not in (IGNORE, token):
            return token, owners[0]
    raise AssertionError("no such token")


def of_a_broken_token(given: Sequence[Sample], *, dropout: float | None) -> tuple[State, int]:
    """Two windows an epoch, each of three batches of two; one sample has a token whose embedding is infinite."""
    token, owner = only_once(given)
    model = llama(dropout=dropout)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("inf")
    order = Shuffled([len(sample.tokens) for sample in given], seed=1, fingerprint="f")
    batches = Batches(given, order, batch_size=2, accumulation=3, pad_id=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return State(model, torch.optim.AdamW(parameters, lr=1e-2), batches), owner


def bits(state: State) -> list[Tensor]:
    """Copies of all weights, and of all that the optimizer keeps."""
    kept = [tensor for entry in state.optimizer.state.values() for tensor in entry.values()]
    return [tensor.detach().clone() for tensor in [*state.model.parameters(), *kept]]


def same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dropout", [None, 0.0], ids=["full", "lora"])
def test_the_samples_of_the_broken_batch_are_named_and_nothing_is_stepped(dropout: float | None) -> None:
    state, owner = of_a_broken_token(samples(12), dropout=dropout)
    twin, _ = of_a_broken_token(samples(12), dropout=dropout)
    ((good, bad),) = [
        (number, batch)
        for number, window in enumerate(islice(twin.batches, 2))
        for batch in window
        if owner in batch.sample_ids
    ]
    steps = training_steps(state, Falling(), total_steps=4, clip_grad_norm=1.0, device=CPU)
    assert len(list(islice(steps, good))) == good
    before = bits(state)
    named = ", ".join(map(str, sorted(bad.sample_ids)))
    said = f"step {good + 1}: loss nan, gradient norm nan: not finite, not stepped; samples {named}; train"
    with pytest.raises(TrainingError, match=said):
        next(steps)
    assert len(bad.sample_ids) == 2
    assert same_bits(bits(state), before)
    assert state.skipped_steps == 0


@pytest.mark.parametrize("dropout", [None, 0.0], ids=["full", "lora"])
def test_a_skipped_step_changes_its_place_in_the_run_and_nothing_else(dropout: float | None) -> None:
    state, owner = of_a_broken_token(samples(12), dropout=dropout)
    taken, before, skipped = [], bits(state), []
    start = before
    for step in training_steps(state, Falling(), total_steps=4, clip_grad_norm=1.0, device=CPU, on_nonfinite="skip"):
        assert (step.number, step.lr) == (state.step, pytest.approx(1e-2 * (1 - (state.step - 1) / 4)))
        assert state.skipped_steps == len(skipped) + (step.skipped is not None)
        assert all(p.grad is None for p in state.model.parameters())
        after = bits(state)
        if step.skipped is not None:
            assert math.isnan(step.loss)
            assert str(owner) in step.skipped.partition("; samples ")[2].split(", ")
            assert "train.on_nonfinite" not in step.skipped
            assert same_bits(after, before)
            skipped.append(step.number)
        else:
            assert state.train_loss == step.loss
            assert not same_bits(after, before)
            taken.append(step)
        before = after
    assert len(skipped) == 2  # the sample is seen once an epoch
    assert state.train_loss == taken[-1].loss
    assert state.tokens == 2 * sum(len(sample.tokens) for sample in samples(12))
    assert state.batches.state_dict()["epoch"] == 2
    counts = {float(entry["step"]) for entry in state.optimizer.state.values()}
    assert counts == {2.0}

    # The same as a run that has the good windows alone, at the same rates.
    other, _ = of_a_broken_token(samples(12), dropout=dropout)
    good = [window for number, window in enumerate(islice(other.batches, 4), start=1) if number not in skipped]
    other.batches = Windows(good)
    assert same_bits(bits(other), start)
    rates = [1 - (number - 1) / 4 for number in range(1, 5) if number not in skipped]
    list(training_steps(other, Listed(rates), total_steps=2, clip_grad_norm=1.0, device=CPU))
    assert same_bits(bits(other), before)


class Listed:
    def __init__(self, factors: Sequence[float]) -> None:
        self.factors = factors

    def factor(self, step: int, total_steps: int) -> float:
        return self.factors[step]


class Reads(TorchDispatchMode):
    """Counts the numbers that Python reads of tensors: on a GPU it waits for each."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_good_step_waits_for_its_loss_and_its_norm_alone() -> None:
    model = llama()
    state = State(model, torch.optim.SGD(model.parameters(), lr=0.1), Windows([windows(2)]))
    with Reads() as reads:
        list(training_steps(state, Flat(), total_steps=3, clip_grad_norm=1.0, device=CPU))
    counted = 4  # how many tokens of each of the four batches are trained on
    assert reads.number == 3 * (counted + 2)


@pytest.mark.parametrize("number", [8, 40])
def test_a_gradient_alone_that_is_not_finite_names_the_whole_window(number: int) -> None:
    """All rows of the head are one huge vector: equal logits and a finite loss, gradients whose squares overflow."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(1e32)
    window = batches_by_length(samples(number), 4, pad_id=0)
    state = State(model, torch.optim.SGD(model.parameters(), lr=0.1), Windows([window]))
    (step,) = training_steps(state, Flat(), total_steps=1, clip_grad_norm=1.0, device=CPU, on_nonfinite="skip")
    assert math.isfinite(step.loss)
    assert step.skipped is not None
    named = ", ".join(map(str, range(min(number, 32)))) + (" and 8 more" if number == 40 else "")
    assert step.skipped.endswith(f"gradient norm {step.grad_norm}: not finite, not stepped; samples {named}")
    assert not math.isfinite(step.grad_norm)


def test_a_window_with_nothing_to_train_has_no_loss_and_no_gradient() -> None:
    model = llama()
    tokens = torch.randint(0, 61, (2, 9))
    empty = Batch(tokens, torch.full_like(tokens, IGNORE))
    loss, found = gradients(model, [empty])
    assert loss == 0.0
    assert all((gradient == 0).all() for gradient in found.values())
    # and a batch without trained tokens changes nothing in a window that has some
    expected_loss, expected = gradients(model, windows(8))
    with_empty_loss, with_empty = gradients(model, [*windows(8), empty])
    assert with_empty_loss == expected_loss
    assert all(torch.equal(with_empty[name], gradient) for name, gradient in expected.items())


def test_evaluation_is_the_mean_over_tokens_however_they_are_grouped() -> None:
    model = llama(dropout=0.5)
    losses = [evaluate(model, batches_by_length(samples(11), size, 0), CPU) for size in (1, 3, 11)]
    assert model.training
    model.eval()
    singles = [collate([sample], 0) for sample in samples(11)]
    with torch.no_grad():
        losses_each = [sum_cross_entropy(model.hidden(b.tokens), b.labels, model.lm_head) for b in singles]
    exact = float(sum(losses_each)) / sum(b.num_trained for b in singles)
    assert losses == pytest.approx([exact] * 3, rel=1e-6)
    evaluate(model, windows(8), CPU)
    assert not model.training


def test_evaluation_draws_no_random_numbers_and_leaves_no_gradient() -> None:
    model = llama(dropout=0.5)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    first = evaluate(model, windows(4), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate(model, windows(4), CPU) == first
    assert all(p.grad is None for p in model.parameters())


def test_an_epoch_of_batches_sees_every_sample_once() -> None:
    order = Shuffled([len(sample.tokens) for sample in samples(11)], seed=1, fingerprint="f")
    batches = Batches(samples(11), order, batch_size=2, accumulation=2, pad_id=0)
    state = State(llama(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), batches)
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=0.0)
    steps = list(training_steps(state, Flat(), total_steps=6, clip_grad_norm=None, device=CPU))
    total = sum(len(sample.tokens) for sample in samples(11))
    assert [step.ends_epoch for step in steps] == [False, False, True, False, False, True]
    assert sum(step.tokens for step in steps[:3]) == sum(step.tokens for step in steps[3:]) == total
