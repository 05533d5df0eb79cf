"""Memory that runs out: told apart from bugs, named, and the step done again in half as many rows at once."""

from __future__ import annotations

import errno
import gc
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoint.bitwise import assert_bitwise
from tuner.build import build_model, load_base
from tuner.checkpoint.default import Checkpoints
from tuner.checkpoint.folder import TRAINING, checkpoints_of, read
from tuner.checkpoint.random_states import random_states
from tuner.checkpoint.snapshot import trainable
from tuner.checkpoint.store import CheckpointStore
from tuner.data.batches import Batches, batches_by_length
from tuner.data.order import Packed, Shuffled
from tuner.errors import ConfigError, OutOfMemory, TunerError
from tuner.logging.ending import is_wrong_input, reason_of
from tuner.loop import Step, evaluate, training_steps
from tuner.memory.default import MemoryTechniques
from tuner.models.decoder import Decoder
from tuner.models.llama import LlamaConfig
from tuner.out_of_memory import ADVICE, ends_as_out_of_memory, is_out_of_memory, out_of_memory_said, without_frames
from tuner.peft.full import Full
from tuner.peft.lora import LoRA
from tuner.row_limit import RowLimit
from tuner.types import IGNORE, Batch, Precision, Sample, State

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CPU = torch.device("cpu")
OF_A_GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB of which 1.12 GiB is free."
    " Including non-PyTorch memory, this process has 22.55 GiB memory in use."
)
OF_A_CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "99 bytes. Error code 12 (Cannot allocate memory)\nC++ frames"
)


def caused_by(cause: BaseException) -> Exception:
    """As what builds objects from a configuration wraps what they raise."""
    error = ValueError("Error in call to target")
    error.__cause__ = cause
    return error


SAID = [
    (torch.OutOfMemoryError(OF_A_GPU), OF_A_GPU.partition(". Including")[0]),
    (RuntimeError(OF_A_CPU), OF_A_CPU.partition("0. ")[2].partition("\n")[0]),
    (
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes."),
        "DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes",
    ),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "CUDA error: out of memory"),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ),
    (MemoryError(), "MemoryError"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
    (caused_by(torch.OutOfMemoryError("CUDA out of memory.")), "CUDA out of memory"),
]


@pytest.mark.parametrize(("error", "asked"), SAID, ids=[asked[:40] for _, asked in SAID])
def test_what_says_that_memory_ran_out(error: BaseException, asked: str) -> None:
    assert is_out_of_memory(error)
    assert reason_of(error) == out_of_memory_said(error) == f"out of memory: {asked}; {ADVICE}"
    assert not is_wrong_input(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
        ConfigError("out of memory"),
        caused_by(RuntimeError("something else")),
    ],
    ids=repr,
)
def test_what_does_not(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    assert reason_of(error) == f"{type(error).__name__}: {error}"
    if isinstance(error, Exception):
        with pytest.raises(type(error)) as caught, ends_as_out_of_memory("step 1"):
            raise error
        assert caught.value is error


def test_a_run_that_ran_out_of_memory_is_no_wrong_input_and_no_bug() -> None:
    with pytest.raises(OutOfMemory) as caught, ends_as_out_of_memory("step 3, half done"):
        raise MemoryError
    error = caught.value
    assert isinstance(error, TunerError)
    assert str(error) == reason_of(error) == f"out of memory: step 3, half done: MemoryError; {ADVICE}"
    assert reason_of(caused_by(error)) == str(error)
    assert not is_wrong_input(error)
    assert error.__notes__[0].endswith("\nMemoryError")
    with pytest.raises(OutOfMemory) as again, ends_as_out_of_memory():
        raise error
    assert str(again.value) == str(error)
    assert again.value.__notes__[0].endswith("\nMemoryError")
    assert error.__traceback__ is None


@pytest.fixture(autouse=True, scope="module")
def _what_was_imported_is_not_searched() -> Iterator[None]:
    """A second for each halving, which looks for what nothing holds any more."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# ---- batches in parts ----


def samples(number: int) -> list[Sample]:
    """Of unequal lengths (2 to 25), the first part and the last token of each not trained on."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(number):
        length = int(torch.randint(4, 26, (1,), generator=generator))
        prompt = int(torch.randint(0, length - 2, (1,), generator=generator))
        tokens = torch.randint(0, 61, (length,), generator=generator).tolist()
        made.append(Sample(tokens, [IGNORE] * prompt + tokens[prompt:-1] + [IGNORE]))
    return made


def equal(found: Batch, expected: Batch) -> bool:
    same = torch.equal(found.tokens, expected.tokens) and torch.equal(found.labels, expected.labels)
    numbers = [
        (list(b.lengths or ()), b.num_tokens, b.num_trained, b.sample_ids, [list(row) for row in b.documents or ()])
        for b in (found, expected)
    ]
    return same and numbers[0] == numbers[1] and (found.documents is None) == (expected.documents is None)


@pytest.mark.parametrize("packed", [False, True])
def test_parts_of_a_batch_are_the_batches_of_so_many_rows(packed: bool) -> None:
    lengths = [len(sample.tokens) for sample in samples(30)]
    order = (
        Packed(lengths, row_tokens=48, seed=1, fingerprint="f")
        if packed
        else Shuffled(lengths, seed=1, fingerprint="f")
    )
    make = partial(Batches, samples(30), order, pad_id=0)
    large, small = make(batch_size=8, accumulation=1), make(batch_size=2, accumulation=4)
    widths = set()
    for window, parts in itertools.islice(zip(large, small, strict=True), 3):
        cut = RowLimit(most=2).parts(window)
        assert len(cut) == len(parts)
        assert all(map(equal, cut, parts))
        assert RowLimit().parts(window) == RowLimit(most=8).parts(window) == window
        widths |= {part.tokens.shape[1] for part in cut}
        assert sum((part.sample_ids for part in cut), ()) == window[0].sample_ids
    assert len(widths) > 2


def test_an_odd_batch_and_one_without_padding_are_cut_too() -> None:
    tokens = torch.arange(15).view(5, 3)
    parts = Batch(tokens, tokens.clone()).cut(3)
    assert [part.num_rows for part in parts] == [3, 2]
    assert torch.equal(torch.cat([part.tokens for part in parts]), tokens)
    assert [part.num_tokens for part in parts] == [9, 6]
    assert [part.sample_ids for part in parts] == [(), ()]


# ---- training ----


def model_of(*, dropout: float | None = None) -> Decoder:
    torch.manual_seed(7)
    base = load_base(LlamaConfig.from_hugging_face(SHAPE, None), torch.float32, CPU, seed=3)
    lora = LoRA("lora", 4, 8, dropout or 0.0, ["q_proj", "v_proj"], True, False, False)
    peft = Full("full") if dropout is None else lora
    model = build_model(base, peft, Precision("fp32", "float32"), MemoryTechniques("none", False, False, False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model.train()


def state_of(
    batch_size: int, accumulation: int = 1, *, halves: bool = True, dropout: float | None = None, packed: bool = False
) -> State:
    model = model_of(dropout=dropout)
    lengths = [len(sample.tokens) for sample in samples(30)]
    order = (
        Packed(lengths, row_tokens=48, seed=1, fingerprint="f")
        if packed
        else Shuffled(lengths, seed=1, fingerprint="f")
    )
    batches = Batches(samples(30), order, batch_size=batch_size, accumulation=accumulation, pad_id=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    state = State(model, torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3), batches)
    state.train_rows, state.val_rows = RowLimit(halves), RowLimit(halves)
    return state


@contextmanager
def memory_for(state: State, rows: int, *, where: str, error: BaseException | None = None) -> Iterator[list[int]]:
    """Raise as an allocator does for more rows than that, in the forward or the backward pass of the last layer.

    Yields:
        The rows of each pass that ran out.
    """
    ran_out: list[int] = []
    model = state.model

    def full(number: int) -> None:
        if number > rows:
            ran_out.append(number)
            raise error or torch.OutOfMemoryError(OF_A_GPU)

    def forward(module: nn.Module, args: Any, out: Tensor) -> None:
        if where == "forward":
            full(len(out))
        elif out.requires_grad:
            out.register_hook(lambda gradient: full(len(gradient)))  # type: ignore[no-untyped-call]

    layer = model.layers[0 if where == "backward" else 1]  # type: ignore[union-attr, index]
    handle = layer.register_forward_hook(forward)
    try:
        yield ran_out
    finally:
        handle.remove()


class Flat:
    def factor(self, step: int, total_steps: int) -> float:
        return 1.0


def train(state: State, until: int, **words: Any) -> list[Step]:
    steps = training_steps(state, Flat(), total_steps=100, clip_grad_norm=1.0, device=CPU, **words)
    return list(itertools.islice(steps, until - state.step))


def numbers(steps: list[Step]) -> list[tuple[float, ...]]:
    return [(s.number, s.loss, s.grad_norm, s.lr, s.tokens, s.padding_share, s.ends_epoch) for s in steps]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("rows", [4, 2, 1])
def test_the_rest_of_the_run_is_that_of_the_smaller_batches(where: str, rows: int, packed: bool) -> None:
    """Bit for bit, without dropout: window and parts are those of such a run; and to rounding, that of the large."""
    state = state_of(8, packed=packed)
    with memory_for(state, rows, where=where) as ran_out, pytest.warns(UserWarning, match="^out of memory") as warned:
        steps = train(state, 6)
    assert ran_out == [size for size in (8, 4, 2) if size > rows]
    assert [str(warning.message) for warning in warned] == [
        f"out of memory: step 1 with batches of {size} rows: {SAID[0][1]}; from here on they have {size // 2}, and "
        "there are as many more of them: the same rows make a step"
        for size in ran_out
    ]
    assert (state.train_rows, state.val_rows) == (RowLimit(True, rows), RowLimit(True))

    small = state_of(rows, 8 // rows, packed=packed)
    assert numbers(steps) == numbers(train(small, 6))
    assert_bitwise(trainable(state.model), trainable(small.model))
    assert_bitwise(state.optimizer.state_dict(), small.optimizer.state_dict())
    assert state.batches.state_dict() == small.batches.state_dict()

    large = state_of(8, packed=packed)
    expected = train(large, 6)
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected], rel=1e-5)
    assert [step.grad_norm for step in steps] == pytest.approx([step.grad_norm for step in expected], rel=1e-4)
    start = trainable(model_of())
    for name, weight in trainable(large.model).items():
        assert (weight - start[name]).abs().max() > 1e-3
        assert (trainable(state.model)[name] - weight).abs().max() < 1e-4, name


def test_the_gradient_of_a_window_is_that_of_the_whole() -> None:
    """Where memory runs out in the second of three batches, what the first one left does not count twice."""
    gradients = []
    for rows in (4, 3):
        state = state_of(4, 3)
        state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)
        start = {name: weight.clone() for name, weight in trainable(state.model).items()}
        calls = 0

        def second(module: nn.Module, args: Any, rows: int = rows) -> None:
            nonlocal calls
            calls += 1
            if rows == 3 and calls == 2:
                raise torch.OutOfMemoryError("full")

        state.model.layers[0].register_forward_pre_hook(second)  # type: ignore[union-attr, index]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (step,) = list(
                itertools.islice(training_steps(state, Flat(), total_steps=9, clip_grad_norm=None, device=CPU), 1)
            )
        assert calls == (3 if rows == 4 else 2 + 6)
        gradients.append((step, {name: start[name] - weight for name, weight in trainable(state.model).items()}))
    (whole, expected), (halved, found) = gradients
    assert halved.loss == pytest.approx(whole.loss, rel=1e-6)
    assert halved.tokens == whole.tokens
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4
        assert (found[name] - gradient).abs().max() <= 2e-6, name


def test_a_row_alone_that_does_not_fit_ends_the_run_with_nothing_stepped() -> None:
    state = state_of(4)
    before = {name: weight.clone() for name, weight in trainable(state.model).items()}
    fills = memory_for(state, 0, where="backward")
    with fills as ran_out, pytest.warns(UserWarning, match="batches of"), pytest.raises(OutOfMemory) as caught:
        train(state, 1)
    assert ran_out == [4, 2, 1]
    assert str(caught.value) == (
        f"out of memory: step 1 with a batch of 1 row of 24 tokens, which cannot be halved: {SAID[0][1]}; {ADVICE}"
    )
    assert state.step == 0
    assert_bitwise(trainable(state.model), before)


def test_without_retry_the_run_ends_and_says_what_would_help() -> None:
    state = state_of(4, halves=False)
    with memory_for(state, 2, where="forward", error=RuntimeError(OF_A_CPU)) as ran_out, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OutOfMemory) as caught:
            train(state, 1)
    assert ran_out == [4]
    assert str(caught.value) == (
        f"out of memory: step 1 with batches of 4 rows of 24 tokens: {SAID[1][1]}; train.on_oom=retry goes on with "
        f"half as many rows at once in twice as many batches; {ADVICE}"
    )
    assert state.train_rows == RowLimit()


def test_a_bug_is_not_done_again() -> None:
    state = state_of(4)
    fills = memory_for(state, 2, where="forward", error=RuntimeError("a bug"))
    with fills as ran_out, pytest.raises(RuntimeError, match="a bug"):
        train(state, 1)
    assert ran_out == [4]


@pytest.mark.parametrize("halves", [True, False])
def test_activations_and_gradients_are_gone_before_it_is_done_again(halves: bool) -> None:
    """Or there were no room for them again; nor does the error that ends a run keep them."""
    state = state_of(8, 2, halves=halves)
    alive: list[weakref.ref[Tensor]] = []
    calls: list[int] = []

    def look(module: nn.Module, args: Any, out: Tensor) -> None:
        calls.append(len(out))
        if len(calls) > 2:
            return
        alive.append(weakref.ref(out))
        if len(calls) == 2:
            assert any(p.grad is not None for p in state.model.parameters())
            raise torch.OutOfMemoryError("full")

    def again(module: nn.Module, args: Any) -> None:
        if len(calls) == 2:
            assert [ref() for ref in alive] == [None, None]
            assert all(p.grad is None for p in state.model.parameters())

    layer = state.model.layers[1]  # type: ignore[union-attr, index]
    layer.register_forward_hook(look)
    state.model.layers[0].register_forward_pre_hook(again)  # type: ignore[union-attr, index]
    if halves:
        with pytest.warns(UserWarning, match="batches of 8 rows"):
            train(state, 1)
        assert calls == [8, 8, 4, 4, 4, 4]
    else:
        with pytest.raises(OutOfMemory) as caught:
            train(state, 1)
        gc.collect()
        assert [ref() for ref in alive] == [None, None], caught


@pytest.mark.parametrize("in_backward", [False, True])
def test_what_was_stepped_is_not_done_again(in_backward: bool) -> None:
    state = state_of(4)

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("full")

    words: dict[str, Any] = {}
    if in_backward:
        words = {"in_backward": MemoryTechniques("none", False, True, False).steps_in_backward(state.optimizer, None)}
    state.optimizer.register_step_pre_hook(full)
    said = "parameters are stepped in backward" if in_backward else "half done: the optimizer's step"
    with pytest.raises(OutOfMemory, match=rf"out of memory: step 1[:,] {said}[ ,\w]* not taken back: full; "):
        train(state, 1, **words)
    assert (state.step, state.train_rows.most) == (0, None)


# ---- resuming ----


def store(out: Path) -> CheckpointStore:
    return CheckpointStore(out, Checkpoints("auto", None, None, False, 9, 0, False, "stop", True, False))


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_a_run_goes_on_bit_for_bit_behind_a_halving(packed: bool, tmp_path: Path) -> None:
    """With dropout, whose draws depend on the rows of a batch; the second process has room for all of them."""
    whole = state_of(8, dropout=0.3, packed=packed)
    with memory_for(whole, 2, where="backward"), pytest.warns(UserWarning, match="out of memory"):
        before = train(whole, 3)
    whole.val_rows.most = 3
    store(tmp_path).save(whole, None)
    expected = train(whole, 8)
    drawn = random_states()

    second = state_of(8, dropout=0.3, packed=packed, halves=False)
    torch.manual_seed(12345)
    assert store(tmp_path).restore(second, 8) is not None
    assert (second.train_rows, second.val_rows) == (RowLimit(False, 2), RowLimit(False, 3))
    assert numbers(train(second, 8)) == numbers(expected)
    assert before[-1].number == 3
    assert_bitwise(trainable(second.model), trainable(whole.model))
    assert_bitwise(second.optimizer.state_dict(), whole.optimizer.state_dict())
    assert_bitwise(random_states(), drawn)


def test_a_checkpoint_of_an_earlier_version_knows_no_limit(tmp_path: Path) -> None:
    state = state_of(4)
    train(state, 1)
    store(tmp_path).save(state, None)
    (folder,) = checkpoints_of(tmp_path)
    training = torch.load(folder / TRAINING, weights_only=True)
    assert training.pop("rows") == {"train_rows": None, "val_rows": None}
    torch.save(training, folder / TRAINING)
    assert read(folder).training["rows"] == {}


# ---- evaluation ----


@pytest.mark.parametrize("rows", [8, 4, 3, 1])
def test_an_evaluation_goes_on_in_halves_and_finds_the_same_mean(rows: int) -> None:
    state, limit = state_of(8), RowLimit(halves=True)
    batches = batches_by_length(samples(21), 8, pad_id=0)
    expected = evaluate(state.model, batches, CPU)
    with memory_for(state, rows, where="forward") as ran_out, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = evaluate(state.model, batches, CPU, limit)
        assert evaluate(state.model, batches, CPU, limit) == pytest.approx(found, rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-6)
    assert (limit.most, ran_out) == {8: (None, []), 4: (4, [8]), 3: (2, [8, 4]), 1: (1, [8, 4, 2])}[rows]
    assert [str(w.message).partition(" with")[0] for w in warned] == ["out of memory: evaluation"] * len(ran_out)
    assert state.model.training
    assert math.isfinite(found)


@pytest.mark.parametrize(("limit", "said"), [(None, "train.on_oom=retry goes on"), (RowLimit(True), "1 row of")])
def test_an_evaluation_without_room_is_named(limit: RowLimit | None, said: str) -> None:
    state = state_of(8)
    batches: Callable[[], list[Batch]] = partial(batches_by_length, samples(21), 8, pad_id=0)
    with memory_for(state, 0, where="forward"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(OutOfMemory, match=rf"^out of memory: evaluation with .*{said}"):
            evaluate(state.model, batches(), CPU, limit)


def test_an_error_that_is_its_own_cause_has_an_end() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)
    full = MemoryError()
    full.__cause__ = full
    assert str(without_frames(full, "out of memory")) == "out of memory"
