"""A run that stops and goes on in a new process ends, bit for bit, where one that never stopped ends."""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.checkpoint.bitwise import assert_bitwise, flat
from tuner.build import build_model, load_base
from tuner.checkpoint.default import Checkpoints
from tuner.checkpoint.folder import checkpoints_of
from tuner.checkpoint.random_states import random_states, seed_all, set_random_states
from tuner.checkpoint.snapshot import trainable
from tuner.checkpoint.store import CheckpointStore
from tuner.data.batches import Batches
from tuner.data.order import Grouped, Packed, Shuffled
from tuner.errors import CheckpointError
from tuner.loop import Step, training_steps
from tuner.memory.default import MemoryTechniques
from tuner.models.decoder import Decoder
from tuner.models.llama import LlamaConfig
from tuner.optimizers.adamw import adamw
from tuner.optimizers.adamw8bit import adamw8bit
from tuner.optimizers.groups import trained
from tuner.peft.full import Full
from tuner.peft.lora import LoRA
from tuner.precision.amp_bf16 import amp_bf16
from tuner.precision.amp_fp16 import amp_fp16
from tuner.precision.bf16_stochastic import bf16_stochastic
from tuner.precision.stochastic_rounding import round_updates
from tuner.quantization.nf4 import NF4
from tuner.quantization.none import NoQuantization
from tuner.results import Kept, results_bytes, save_results
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.tiny import write_tiny_tokenizer
from tuner.train import loss_scale_of
from tuner.types import Precision, Sample, State

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
ADAMW = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.01, "loraplus_lr_ratio": None, "no_decay": []}
OPTIMIZERS = {
    "adamw": lambda parameters: adamw(parameters, **ADAMW, fused=True),
    "adamw8bit": lambda parameters: adamw8bit(parameters, **ADAMW, min_8bit_size=256),
}
METHODS = ("lora", "qlora", "full")
ORDERS = {"none": Shuffled, "group": partial(Grouped, window=4), "pack": partial(Packed, row_tokens=16)}
PRECISIONS = {
    "fp32": Precision("fp32", "float32"),
    "bf16": Precision("bf16", "bfloat16"),
    "bf16_stochastic": bf16_stochastic("bf16"),
    "amp_bf16": amp_bf16("auto"),
    "amp_fp16": amp_fp16("auto", initial_loss_scale=2.0**23, growth_interval=2),  # overflows, falls and rises again
}


def fresh_state(
    method: str,
    optimizer: str,
    precision: str = "fp32",
    *,
    checkpointing: bool = False,
    packing: str = "none",
    fingerprint: str = "x",
    broken_token: int | None = None,
) -> State:
    """As a new process makes it: seeded, built, with nothing of another run.

    The embedding of `broken_token` is infinite, and with it the loss of every window that has the token.
    """
    torch.manual_seed(7)
    dtype = getattr(torch, PRECISIONS[precision].held)
    quantization = NF4(64, double_quant=True) if method == "qlora" else NoQuantization()
    shape = {**SHAPE, "tie_word_embeddings": broken_token is None}
    base = load_base(LlamaConfig.from_hugging_face(shape, None), dtype, torch.device("cpu"), 1, quantization)
    if broken_token is not None:
        nn.init.constant_(base.model.embed_tokens.weight[broken_token], torch.inf)
    adapters = {"apply_lora_to_mlp": True, "apply_lora_to_output": False, "use_rslora": False}
    lora = LoRA("lora", 16, 8, 0.3, ["q_proj", "v_proj"], **adapters)
    peft = Full("full") if method == "full" else lora
    model = build_model(base, peft, PRECISIONS[precision], MemoryTechniques(checkpointing, False, False, False))
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 61, (length,), generator=generator).tolist() for length in range(4, 17)]
    order = ORDERS[packing]([len(row) for row in rows], seed=5, fingerprint=fingerprint)
    batches = Batches([Sample(row, row) for row in rows], order, batch_size=2, accumulation=2, pad_id=0)
    made = OPTIMIZERS[optimizer](trained(model))
    state = State(model, made, batches, loss_scale=loss_scale_of(PRECISIONS[precision]))
    if PRECISIONS[precision].stochastic_rounding:
        round_updates(state, seed=3)
    return state


class Falling:
    def factor(self, step: int, total_steps: int) -> float:
        return 1.0 - step / total_steps


def store(out: Path, **keys: Any) -> CheckpointStore:
    given = {"resume": "auto", "every_steps": None, "every_minutes": None, "every_epoch": False, "keep_last": 1}
    given |= {"keep_best": 0, "asynchronous": False, "on_error": "stop"}
    given |= {"save_adapter": True, "save_merged": False}
    return CheckpointStore(out, Checkpoints(**{**given, **keys}))


def train(state: State, until: int, on_nonfinite: Literal["stop", "skip"] = "stop") -> list[Step]:
    words: Any = {"clip_grad_norm": 1.0, "device": torch.device("cpu"), "on_nonfinite": on_nonfinite}
    steps = training_steps(state, Falling(), total_steps=10, **words)
    return list(itertools.islice(steps, until - state.step))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "optimizer", "precision", "checkpointing", "packing"),
    [
        *((method, optimizer, "fp32", False, "none") for method in METHODS for optimizer in OPTIMIZERS),
        ("qlora", "adamw8bit", "bf16", False, "none"),
        ("full", "adamw", "bf16", False, "none"),
        ("lora", "adamw", "fp32", True, "none"),
        ("lora", "adamw", "fp32", False, "group"),
        ("lora", "adamw", "fp32", True, "pack"),
        ("full", "adamw", "bf16", False, "pack"),
        ("full", "adamw", "bf16_stochastic", False, "none"),
        ("lora", "adamw8bit", "bf16_stochastic", False, "pack"),
        ("full", "adamw", "amp_bf16", True, "none"),
        ("qlora", "adamw8bit", "amp_fp16", False, "pack"),
        ("full", "adamw", "amp_fp16", False, "none"),
    ],
)
@pytest.mark.parametrize("stop", [1, 4, 7])  # 4 windows an epoch: within the first, at its end, within the second
def test_stopped_and_continued_is_never_stopped(
    method: str, optimizer: str, precision: str, checkpointing: bool, packing: str, stop: int, tmp_path: Path
) -> None:
    whole = fresh_state(method, optimizer, precision, checkpointing=checkpointing, packing=packing)
    expected = train(whole, 10)

    first = fresh_state(method, optimizer, precision, checkpointing=checkpointing, packing=packing)
    before = train(first, stop)
    first.before, first.val_loss_before = ["text"], 4.5
    folder = store(tmp_path).save(first, 4.25)
    assert folder == tmp_path / "checkpoints" / f"step-{stop:08d}"
    del first

    second = fresh_state(method, optimizer, precision, checkpointing=checkpointing, packing=packing)
    torch.manual_seed(12345)  # the new process is somewhere else in its random numbers
    restored = store(tmp_path).restore(second, 10)
    assert (restored and restored.folder, restored and restored.notes) == (folder, ())
    assert (second.step, second.before, second.val_loss_before) == (stop, ["text"], 4.5)
    after = train(second, 10)

    numbers = [repr((step.number, step.loss, step.grad_norm, step.lr, step.tokens)) for step in expected]  # NaN too
    assert [repr((s.number, s.loss, s.grad_norm, s.lr, s.tokens)) for s in before + after] == numbers
    assert_bitwise(trainable(second.model), trainable(whole.model))
    assert_bitwise(second.optimizer.state_dict(), whole.optimizer.state_dict())
    assert second.batches.state_dict() == whole.batches.state_dict()
    assert second.tokens == whole.tokens
    assert (second.loss_scale, second.skipped_steps) == (whole.loss_scale, whole.skipped_steps)
    assert (whole.skipped_steps > 0) is (precision == "amp_fp16")
    kinds = {v.dtype for v in flat(whole.optimizer.state_dict()).values() if isinstance(v, Tensor) and v.numel() > 256}
    assert (torch.uint8 in kinds) is (optimizer == "adamw8bit")  # the 8-bit state is really there
    start = trainable(fresh_state(method, optimizer, precision).model)
    assert all(not torch.equal(start[name], tensor) for name, tensor in trainable(whole.model).items())


@pytest.mark.parametrize(("method", "optimizer"), [("lora", "adamw"), ("full", "adamw8bit")])
def test_a_run_that_skipped_a_step_is_continued_bit_for_bit(method: str, optimizer: str, tmp_path: Path) -> None:
    words: Any = {"broken_token": 7}
    whole = fresh_state(method, optimizer, **words)
    expected = train(whole, 10, "skip")
    skipped = [step.number for step in expected if step.skipped is not None]
    assert 2 <= len(skipped) <= 5
    assert whole.skipped_steps == len(skipped)
    for stop in {skipped[0], skipped[0] - 1, skipped[-1]} - {0}:  # behind a skipped step, and before one
        first = fresh_state(method, optimizer, **words)
        before = train(first, stop, "skip")
        folder = tmp_path / str(stop)
        store(folder).save(first, None)
        second = fresh_state(method, optimizer, **words)
        torch.manual_seed(12345)
        assert store(folder).restore(second, 10)
        assert second.skipped_steps == sum(number <= stop for number in skipped)
        after = train(second, 10, "skip")
        numbers = [repr((step.number, step.loss, step.grad_norm, step.lr, step.skipped)) for step in expected]
        assert [repr((s.number, s.loss, s.grad_norm, s.lr, s.skipped)) for s in before + after] == numbers
        assert_bitwise(trainable(second.model), trainable(whole.model))
        assert_bitwise(second.optimizer.state_dict(), whole.optimizer.state_dict())
        assert second.batches.state_dict() == whole.batches.state_dict()
        assert (second.skipped_steps, second.train_loss) == (whole.skipped_steps, whole.train_loss)


def test_dropout_alone_would_be_seen() -> None:
    """The comparison above can fail: with other random numbers from the middle on, the end is another."""
    whole, other = fresh_state("lora", "adamw"), fresh_state("lora", "adamw")
    torch.manual_seed(0)
    train(whole, 6)
    torch.manual_seed(0)
    train(other, 3)
    torch.manual_seed(1)
    train(other, 6)
    assert whole.train_loss != other.train_loss


def saved(tmp_path: Path, step: int = 2) -> tuple[CheckpointStore, State]:
    state = fresh_state("lora", "adamw")
    train(state, step)
    checkpoints = store(tmp_path)
    checkpoints.save(state, None)
    return checkpoints, state


def names(out: Path) -> list[str]:
    return sorted(path.name.removeprefix("step-").lstrip("0") for path in (out / "checkpoints").iterdir())


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    state, checkpoints = fresh_state("lora", "adamw"), store(tmp_path, keep_last=2, keep_best=1)
    kept = []
    for step, val_loss in enumerate([3.0, 1.0, None, 2.0, float("nan"), 0.5], start=1):
        train(state, step)
        checkpoints.save(state, val_loss)
        kept.append(names(tmp_path))
    assert kept == [["1"], ["1", "2"], ["2", "3"], ["2", "3", "4"], ["2", "4", "5"], ["5", "6"]]


def test_when_a_checkpoint_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def due(step: int, *, ends_epoch: bool = False, is_best: bool = False, **keys: Any) -> bool:
        return store(tmp_path, **keys).due(step, ends_epoch=ends_epoch, is_best=is_best)

    assert [step for step in range(1, 7) if due(step, every_steps=3)] == [3, 6]
    assert not any(due(step) for step in range(1, 7))
    assert (due(1, ends_epoch=True), due(1, ends_epoch=True, every_epoch=True)) == (False, True)
    assert (due(1, is_best=True), due(1, is_best=True, keep_best=1)) == (False, True)
    now = [100.0]
    monkeypatch.setattr("tuner.checkpoint.store.time.monotonic", lambda: now[0])
    by_clock, state = store(tmp_path, every_minutes=0.5), fresh_state("lora", "adamw")
    seen = []
    for now[0] in (129.0, 130.0, 131.0):
        seen.append(by_clock.due(1, ends_epoch=False, is_best=False))
        if seen[-1]:
            by_clock.save(state, None)
    assert seen == [False, True, False]


def test_nothing_of_the_frozen_base_is_kept(tmp_path: Path) -> None:
    _, state = saved(tmp_path)
    trained = sum(p.numel() * 4 for p in state.model.parameters() if p.requires_grad)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size < 3 * trained + 90_000  # weights, two moments, names and the random states


def test_a_folder_without_checkpoints_is_a_fresh_start(tmp_path: Path) -> None:
    state = fresh_state("lora", "adamw")
    assert store(tmp_path).restore(state, 10) is None
    assert state.step == 0


def no_space(*args: Any) -> None:
    raise OSError(28, "No space left on device")


def test_what_broke_off_while_it_was_written_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, state = saved(tmp_path)
    train(state, 3)
    with monkeypatch.context() as patch:
        patch.setattr("tuner.checkpoint.folder.torch.save", no_space)
        with pytest.raises(CheckpointError, match=r"step-00000003: cannot be written: .*No space left"):
            checkpoints.save(state, None)
    assert names(tmp_path) == ["2"]
    again = fresh_state("lora", "adamw")
    assert checkpoints.restore(again, 10)
    assert again.step == 2
    checkpoints.save(state, None)
    assert names(tmp_path) == ["3"]


def test_what_is_written_behind_the_steps_is_the_state_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps change weights, moments and random numbers while the writing thread is held back."""
    may_write = threading.Event()

    def held_back(*args: Any) -> None:
        assert may_write.wait(60)
        write(*args)

    from tuner.checkpoint.folder import write

    monkeypatch.setattr("tuner.checkpoint.folder.write", held_back)
    for optimizer in OPTIMIZERS:
        out = tmp_path / optimizer
        state, expected = fresh_state("lora", optimizer), fresh_state("lora", optimizer)
        torch.manual_seed(3)
        train(expected, 6)
        torch.manual_seed(3)
        train(state, 3)
        may_write.clear()
        with store(out, asynchronous=True) as checkpoints:
            checkpoints.save(state, None)
            train(state, 6)
            assert not checkpoints_of(out)
            may_write.set()
        restored = fresh_state("lora", optimizer)
        assert store(out).restore(restored, 10)
        assert restored.step == 3
        train(restored, 6)
        for one in (state, restored):
            assert_bitwise(trainable(one.model), trainable(expected.model))
            assert_bitwise(one.optimizer.state_dict(), expected.optimizer.state_dict())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_on_error_says_whether_the_run_goes_on(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.checkpoint.folder.torch.save", no_space)
    state = fresh_state("lora", "adamw")
    goes_on = store(tmp_path, on_error="continue", asynchronous=asynchronous)
    with goes_on:
        for step in (1, 2):
            train(state, step)
            goes_on.save(state, None)
    first, second = goes_on.problems()
    for said, step in ((first, 1), (second, 2)):
        assert said.startswith("not saved, training goes on (checkpoint.on_error=continue): ")
        assert f"step-0000000{step}: cannot be written: [Errno 28] No space left on device; none was saved" in said
    with pytest.raises(CheckpointError, match="cannot be written"):
        goes_on.save(state, None, wait=True)  # the last word of a run: it is saved or it is an error
    with pytest.raises(CheckpointError, match="cannot be written"), store(tmp_path, asynchronous=asynchronous) as stops:
        stops.save(state, None)
    left = store(tmp_path, asynchronous=True)
    left.save(state, None)
    with pytest.raises(KeyError) as caught, left:
        raise KeyError("another error")
    assert "No space left on device" in caught.value.__notes__[0]


def test_the_last_word_is_tried_though_the_one_before_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, checkpoints = fresh_state("lora", "adamw"), store(tmp_path, on_error="continue", asynchronous=True)
    train(state, 1)
    with monkeypatch.context() as patch:
        patch.setattr("tuner.checkpoint.folder.torch.save", no_space)
        checkpoints.save(state, None)
        assert checkpoints._behind._thread is not None
        checkpoints._behind._thread.join()
    train(state, 2)
    checkpoints.save(state, None, wait=True)
    assert names(tmp_path) == ["2"]
    (said,) = checkpoints.problems()
    assert "step-00000001: cannot be written" in said


def test_a_checkpoint_that_was_copied_may_have_any_name(tmp_path: Path) -> None:
    checkpoints, state = saved(tmp_path / "run")
    kept = shutil.copytree(checkpoints_of(tmp_path / "run")[0], tmp_path / "the best one")
    branch = CheckpointStore(tmp_path / "branch", checkpoints.keys, origin=kept)
    again = fresh_state("lora", "adamw")
    assert branch.restore(again, 10)
    assert again.step == 2
    assert_bitwise(trainable(again.model), trainable(state.model))


def damage_in(tmp_path: Path) -> dict[str, Callable[[Path], object]]:
    """Ways in which the newest checkpoint may be damaged."""
    return {
        "trainable.safetensors: No such file": lambda folder: (folder / "trainable.safetensors").unlink(),
        "training.pt: No such file": lambda folder: (folder / "training.pt").unlink(),
        "manifest.json: No such file": lambda folder: (folder / "manifest.json").unlink(),
        "manifest.json: Expecting": lambda folder: (folder / "manifest.json").write_text("{"),
        "manifest.json: format 0": lambda folder: (folder / "manifest.json").write_text('{"format": 0}'),
        "manifest.json: 'step'": lambda folder: (folder / "manifest.json").write_text('{"format": 1}'),
        "trainable.safetensors: 100 bytes of": lambda folder: os.truncate(folder / "trainable.safetensors", 100),
        "training.pt: 0 bytes of": lambda folder: os.truncate(folder / "training.pt", 0),
        "training.pt: its sha256": lambda folder: flip_a_bit(folder / "training.pt"),
        "trainable.safetensors: its sha256": lambda folder: flip_a_bit(folder / "trainable.safetensors"),
    }


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("said", damage_in(Path()))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(said: str, tmp_path: Path) -> None:
    state, checkpoints = fresh_state("lora", "adamw"), store(tmp_path, keep_last=2)
    for step in (1, 2):
        train(state, step)
        checkpoints.save(state, None)
    older, newest = checkpoints_of(tmp_path)
    damage_in(tmp_path)[said](newest)
    again, resuming = fresh_state("lora", "adamw"), store(tmp_path)
    restored = resuming.restore(again, 10)
    assert restored is not None
    assert (restored.folder, again.step) == (older, 1)
    (note,) = restored.notes
    assert note.startswith(f"{newest}: damaged: ")
    assert said.partition(": ")[2] in note
    assert note.endswith("; it is left out, step-00000001 is whole")

    train(again, 2)
    assert resuming.save(again, None) == newest  # trained again, it takes the damaged one's place
    assert names(tmp_path) == ["2"]
    third = fresh_state("lora", "adamw")
    assert store(tmp_path).restore(third, 10)
    assert_bitwise(trainable(third.model), trainable(state.model))


def test_a_damaged_one_further_on_does_not_push_out_whole_ones(tmp_path: Path) -> None:
    state, checkpoints = fresh_state("lora", "adamw"), store(tmp_path, keep_last=2)
    for step in (2, 5):
        train(state, step)
        checkpoints.save(state, None)
    flip_a_bit(checkpoints_of(tmp_path)[1] / "training.pt")
    again, resuming = fresh_state("lora", "adamw"), store(tmp_path, keep_last=1)
    resuming.restore(again, 10)
    train(again, 3)
    resuming.save(again, None)
    assert names(tmp_path) == ["3", "5"]


def test_only_damaged_ones_are_refused_and_nothing_begins_anew(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path)
    flip_a_bit(checkpoints_of(tmp_path)[0] / "training.pt")
    state = fresh_state("lora", "adamw")
    with pytest.raises(CheckpointError, match=r"step-00000002: damaged: .*; remove .*/checkpoints to begin anew"):
        checkpoints.restore(state, 10)
    assert state.step == 0


def test_other_parameters_another_optimizer_and_another_base_are_refused(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path)
    with pytest.raises(CheckpointError, match="made with other trainable parameters: model"):
        checkpoints.restore(fresh_state("full", "adamw"), 10)
    wider = fresh_state("lora", "adamw")
    for module in wider.model.modules():
        if hasattr(module, "A"):
            module.A = nn.Parameter(torch.zeros(module.A.shape[0] + 1, module.A.shape[1]))
    with pytest.raises(CheckpointError, match=r"other trainable parameters: .*\.A is \[16, 32\], not \[17, 32\]"):
        checkpoints.restore(wider, 10)
    grouped = fresh_state("lora", "adamw")
    grouped.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(CheckpointError, match="step-00000002: made with another optimizer: "):
        checkpoints.restore(grouped, 10)
    elsewhere = CheckpointStore(tmp_path, checkpoints.keys, base="f" * 64)
    with pytest.raises(CheckpointError, match=r"trained on another base: its fingerprint was None and is f{16}; give"):
        elsewhere.restore(fresh_state("lora", "adamw"), 10)


@pytest.mark.parametrize(
    ("keys", "one_epoch", "copies"),
    [
        ({}, True, 1),
        ({"every_epoch": True}, True, 1),
        ({"every_epoch": True}, False, 2),  # the old one is removed once the new one is whole
        ({"every_steps": 1, "keep_last": 3}, True, 4),
        ({"every_minutes": 1.0, "keep_last": 2, "keep_best": 2}, True, 5),
    ],
)
def test_a_disk_without_room_is_said_before_the_run(
    keys: dict[str, Any], one_epoch: bool, copies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = fresh_state("full", "adamw")
    weights = sum(p.numel() * p.element_size() for p in state.model.parameters())
    left = results_bytes(cast(Decoder, state.model), Kept(adapter=True, merged=False), epoch_ends=3)
    assert left == weights
    enough = copies * weights * 3 + weights  # fp32 weights and two moments as large, and the model once more at the end
    what = "a checkpoint" if copies == 1 else f"{copies} checkpoints"
    for free, refused in ((enough - 1, True), (enough, False)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr("tuner.checkpoint.store.shutil.disk_usage", lambda path, usage=usage: usage)
        with (
            pytest.raises(CheckpointError, match=f"no room for {what} and the results: they may take .* MiB and")
            if refused
            else nullcontext()
        ):
            store(tmp_path / "not" / "there", **keys).require_room(state, left, one_epoch=one_epoch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_the_room_of_results_is_what_they_take(method: str, adapter: bool, merged: bool, tmp_path: Path) -> None:
    """Those of the end and of two epochs before: adapters as they train, weights in the dtype that is computed in."""
    model = cast(Decoder, fresh_state(method, "adamw", "bf16").model)
    write_tiny_tokenizer(tmp_path / "tokenizer")
    tokenizer, kept = load_tokenizer(tmp_path / "tokenizer"), Kept(adapter, merged)
    ends = [replace(kept, merged=merged or method == "full"), kept, kept]
    for number, end in enumerate(ends):
        at_hand = replace(end, adapter=adapter and method != "full")
        save_results(model, tokenizer, tmp_path / str(number), at_hand, facts={}, run=tmp_path)
    files = [file for number in range(3) for file in (tmp_path / str(number)).rglob("*.safetensors")]
    taken = sum(tensor.numel() * tensor.element_size() for file in files for tensor in load_file(file).values())
    assert results_bytes(model, kept, epoch_ends=2) == taken
    assert (taken == 0) is (method != "full" and not adapter and not merged)


def test_other_data_is_refused_by_its_fingerprint(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path)
    other = fresh_state("lora", "adamw", fingerprint="y")
    with pytest.raises(CheckpointError, match=r"the data is not what this run began with: .* was x and is y"):
        checkpoints.restore(other, 10)


def test_fewer_steps_than_were_done_are_refused(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path, step=4)
    with pytest.raises(CheckpointError, match=r"has done 4 steps and 3 are asked for; say train\.max_steps=4 or more"):
        checkpoints.restore(fresh_state("lora", "adamw"), 3)
    assert checkpoints.restore(fresh_state("lora", "adamw"), 4)


@pytest.mark.parametrize("then", ["restore", "save"])
def test_what_a_killed_save_left_is_taken_away(tmp_path: Path, then: str) -> None:
    checkpoints, state = saved(tmp_path)
    left = tmp_path / "checkpoints" / ".step-00000003.unfinished"
    left.mkdir()
    (left / "trainable.safetensors").write_bytes(bytes(1000))
    if then == "restore":
        checkpoints.restore(fresh_state("lora", "adamw"), 10)
    else:
        train(state, 3)
        checkpoints.save(state, None)
    assert not left.exists()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_every_generator_goes_on_where_it_was() -> None:
    def drawn() -> list[float]:
        return [random.random(), float(np.random.standard_normal()), float(torch.rand(()))]

    seed_all(2**40 + 1)
    drawn()
    states = random_states()
    expected = [drawn() for _ in range(3)]
    seed_all(5)
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    set_random_states(torch.load(buffer, weights_only=True))
    assert [drawn() for _ in range(3)] == expected
    seed_all(2**40 + 1)
    again = drawn()
    seed_all(2**40 + 1)
    assert drawn() == again
