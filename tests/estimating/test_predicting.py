"""Few layers and rows say what many have, exactly; and the largest size that fits is the largest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import tuner
from tuner.estimating import predicting
from tuner.estimating.devices import GIB, device_named, devices
from tuner.estimating.predicting import Predictor, depths_to_trace
from tuner.estimating.searching import largest
from tuner.estimating.shapes import Plan
from tuner.verbs.estimate import plan_of

OFFLOADED = ("data.max_seq_len=1024", "memory.activation_offloading=true")
"""So long that layer inputs are moved, of 1 MiB."""
SMALL = ("+scale=tiny", "data.max_seq_len=96", "train.batch_size=2")


def plan(*words: str, device: str = "cpu") -> Plan:
    return plan_of(tuner.freeze(tuner.compose([*SMALL, *words])), device_named(device))


@pytest.mark.parametrize(
    ("words", "device"),
    [
        pytest.param(("model=llama", "model.num_hidden_layers=5"), "h100", marks=pytest.mark.slow),
        pytest.param(
            ("model=gemma2", "model.num_hidden_layers=7", "precision=bf16", "peft=full"), "cpu", marks=pytest.mark.slow
        ),
        pytest.param(
            ("model=qwen2", "model.num_hidden_layers=6", "peft=qlora", "memory.activation_checkpointing=full"),
            "t4",
            marks=pytest.mark.slow,
        ),
        pytest.param(("model=llama", "model.num_hidden_layers=6", "peft=last_layers"), "h100", marks=pytest.mark.slow),
        pytest.param(("model=llama", "model.num_hidden_layers=14", *OFFLOADED), "h100", marks=pytest.mark.slow),
        pytest.param(
            ("model=qwen2", "model.num_hidden_layers=13", *OFFLOADED, "memory.activation_checkpointing=full"),
            "h100",
            marks=pytest.mark.slow,
        ),
        (("model=phi3", "model.num_hidden_layers=6", "train.gradient_accumulation_steps=3", "optimizer=sgd"), "l4"),
    ],
    ids=lambda value: value[0].partition("=")[2] if isinstance(value, tuple) else value,
)
def test_two_depths_say_what_the_whole_has(words: tuple[str, ...], device: str) -> None:
    whole = plan(*words, device=device)
    assert depths_to_trace(whole) is not None
    predicted = Predictor(whole, device_named(device)).peak()
    traced = Predictor(replace(whole, may_be_cut=False), device_named(device)).peak()
    # 512 bytes of rounding a storage that is not of the layers; of the kinds, all are equal.
    assert predicted.total == pytest.approx(traced.total, rel=1e-3)
    for kind, size in traced.by_kind.items():
        assert predicted.by_kind.get(kind, 0) == pytest.approx(size, abs=0.002 * traced.total)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_of_offloaded_activations_some_are_on_their_way(checkpointing: str) -> None:
    words = (
        "model=llama",
        "model.num_hidden_layers=14",
        f"memory.activation_checkpointing={checkpointing}",
        *OFFLOADED,
    )
    moved = Predictor(plan(*words, device="h100"), device_named("h100")).peak()
    stay = Predictor(plan(*words, "memory.activation_offloading=false", device="h100"), device_named("h100")).peak()
    assert moved.total < stay.total
    layer_input = 2 * 1024 * 256 * 4
    if checkpointing == "full":  # of 14 inputs of layers the four ahead, the one wanted and the last norm's
        assert stay.total - moved.total == pytest.approx((14 - 6) * layer_input, abs=2 * layer_input)


@pytest.mark.slow
def test_some_rows_say_what_many_have(monkeypatch: pytest.MonkeyPatch) -> None:
    many = plan("model=llama", "model.num_hidden_layers=2", "train.batch_size=9", "data.max_seq_len=128")
    traced = Predictor(many, device_named("cpu")).peak()
    monkeypatch.setattr(predicting, "TRACED_TOKENS", 6 * 128)
    assert Predictor(many, device_named("cpu")).peak() == traced


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("model=llama",), (1, 2)),
        (("model=gemma2", "model.num_hidden_layers=26"), (2, 4)),  # every other layer slides
        (("model=gemma2", "model.num_hidden_layers=27"), (3, 5)),
        (("model=gemma2", "data.max_seq_len=64"), (1, 2)),  # within the window: all alike
        (("model=gemma2",), None),  # four layers: two periods are the whole
        (("model=mistral",), (1, 2)),  # all of them slide
        (("model=llama", "model.num_hidden_layers=2"), None),
    ],
)
def test_depths_are_whole_periods_with_the_rest_of_the_model(
    words: tuple[str, ...], expected: tuple[int, int] | None
) -> None:
    assert depths_to_trace(plan(*words)) == expected


@pytest.mark.parametrize("available", [0, 99, 100, 5_000, 123_456, 10**9])
@pytest.mark.parametrize("start", [1, 7, 64, 900])
@pytest.mark.parametrize("step", [1, 64])
@pytest.mark.parametrize(
    "total_of",
    [lambda n: 100 + 7 * n, lambda n: 50 + 3 * n + n * n // 4, lambda n: max(400, 9 * n - 80), lambda n: 99],
    ids=["line", "bent upwards", "flat at first", "flat"],
)
def test_the_largest_that_fits_is_found(total_of: Callable[[int], int], available: int, start: int, step: int) -> None:
    limit = 4096
    asked: list[int] = []

    def counted(size: int) -> int:
        asked.append(size)
        return total_of(size)

    fitting = [size for size in {start, *range(step, limit + 1, step)} if total_of(size) <= available]
    assert largest(counted, available, start, step, limit) == max(fitting, default=None)
    assert len(asked) <= 20


def test_the_process_draws_the_numbers_it_would_have_drawn() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Predictor(plan("model=llama", "peft=qlora", "peft.lora_dropout=0.1"), device_named("cpu")).peak()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_device_shows_the_table() -> None:
    with pytest.raises(tuner.errors.ConfigError) as caught:  # type: ignore[attr-defined]
        device_named("h1000")
    text = str(caught.value)
    assert "did you mean h100" in text
    for name, device in devices().items():
        assert f"{name}: {device.memory_bytes / GIB:.1f} GiB" in text


def alive(words: tuple[str, ...], device: str) -> dict[str, int]:
    return Predictor(plan(*words, device=device), device_named(device)).peak().by_kind


def test_components_are_what_they_are_called() -> None:
    words: Any = ("model=llama", "peft=qlora", "precision=bf16", "optimizer=adamw")
    found = alive(words, "cpu")
    model = plan(*words).model
    D, M, L, V = model.hidden_size, model.intermediate_size, model.num_hidden_layers, model.vocab_size
    packed = L * (2 * D * D + 2 * D * D + 3 * D * M)
    adapters = L * 8 * (4 * 2 * D + 3 * (D + M))
    assert found["frozen_weights"] == packed // 2 + (2 * V * D + (2 * L + 1) * D) * 2
    blocks = packed // 64
    assert found["quantization_scales"] == pytest.approx(blocks + blocks // 256 * 4, rel=0.01)
    assert found["trainable_weights"] == adapters * 4  # adapters in fp32
    assert found["optimizer_state"] == pytest.approx(2 * adapters * 4, rel=0.001)


@pytest.mark.slow
def test_a_gpu_without_bfloat16_is_counted_in_fp32() -> None:
    bf16 = ("model=llama", "precision=bf16")
    assert alive(bf16, "t4")["frozen_weights"] == alive(("model=llama", "precision=fp32"), "t4")["frozen_weights"]
    assert alive(bf16, "l4")["frozen_weights"] < alive(bf16, "t4")["frozen_weights"]


@pytest.mark.slow
def test_paged_state_is_told_apart_on_a_gpu_alone() -> None:
    words = ("model=llama", "peft=full", "optimizer=paged_adamw8bit", "model.vocab_size=4096")
    assert alive(words, "h100")["paged_state"] > 0
    assert "paged_state" not in alive(words, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
def test_an_offloaded_optimizer_takes_nothing_of_the_gpu(optimizer: str) -> None:
    words = ("model=llama", "peft=full", f"optimizer={optimizer}")
    plain, offloaded = alive(words, "h100"), alive((*words, "memory.offload_optimizer=true"), "h100")
    assert plain["optimizer_state"] > 0
    del plain["optimizer_state"]
    assert offloaded == pytest.approx(plain, abs=4096)  # at the same peak; bitsandbytes' tables of 1 KiB are gone too


def test_what_an_optimizer_makes_at_once_is_on_the_host_too() -> None:
    words = ("model=llama", "peft=full", "memory.offload_optimizer=true")
    adagrad = ("optimizer=custom", "optimizer._target_=torch.optim.Adagrad")
    assert alive((*words, *adagrad), "h100") == alive(words, "h100")


def test_rounding_is_the_hosts_too() -> None:
    words = ("model=llama", "peft=full", "memory.offload_optimizer=true")
    assert alive((*words, "precision=bf16_stochastic"), "h100") == alive((*words, "precision=bf16"), "h100")


def test_steps_in_backward_on_the_host_leave_one_gradient() -> None:
    words = ("model=llama", "peft=full", "memory.offload_optimizer=true", "train.clip_grad_norm=null")
    found = alive((*words, "memory.optimizer_in_bwd=true"), "h100")
    assert found.get("optimizer_state", 0) == 0
    assert found.get("gradients", 0) < 0.3 * found["trainable_weights"]
