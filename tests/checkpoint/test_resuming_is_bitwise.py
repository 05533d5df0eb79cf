"""A run that stops and goes on in a new process ends, bit for bit, where one that never stopped ends."""

from __future__ import annotations

import io
import itertools
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.build import build_model, load_base
from tuner.checkpoint.default import Checkpoints, trainable_tensors, whole_checkpoints
from tuner.data.batches import Batches
from tuner.errors import CheckpointError
from tuner.loop import Step, training_steps
from tuner.memory.default import MemoryTechniques
from tuner.models.llama import LlamaConfig
from tuner.optimizers.adamw import adamw
from tuner.optimizers.adamw8bit import adamw8bit
from tuner.peft.full import Full
from tuner.peft.lora import LoRA
from tuner.quantization.nf4 import NF4
from tuner.quantization.none import NoQuantization
from tuner.results import results_bytes
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
ADAMW = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.01}
OPTIMIZERS = {
    "adamw": lambda parameters: adamw(parameters, **ADAMW, fused=True),
    "adamw8bit": lambda parameters: adamw8bit(parameters, **ADAMW, min_8bit_size=256),
}
METHODS = ("lora", "qlora", "full")
PRECISIONS = {"fp32": Precision("fp32", "float32"), "bf16": Precision("bf16", "bfloat16")}


def fresh_state(
    method: str, optimizer: str, precision: str = "fp32", *, checkpointing: bool = False, fingerprint: str = "x"
) -> State:
    """As a new process makes it: seeded, built, with nothing of another run."""
    torch.manual_seed(7)
    dtype = getattr(torch, PRECISIONS[precision].compute)
    base = load_base(LlamaConfig.from_hugging_face(SHAPE, None), dtype, torch.device("cpu"), seed=1)
    adapters = {"apply_lora_to_mlp": True, "apply_lora_to_output": False, "use_rslora": False}
    lora = LoRA("lora", 16, 8, 0.3, ["q_proj", "v_proj"], **adapters)
    peft = Full("full") if method == "full" else lora
    quantization = NF4(64, double_quant=True) if method == "qlora" else NoQuantization()
    model = build_model(base, quantization, peft, PRECISIONS[precision], MemoryTechniques(checkpointing))
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 61, (length,), generator=generator).tolist() for length in range(4, 17)]
    batches = Batches(
        [Sample(row, row) for row in rows], batch_size=2, accumulation=2, pad_id=0, seed=5, fingerprint=fingerprint
    )
    return State(model, OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad]), batches)


class Falling:
    def factor(self, step: int, total_steps: int) -> float:
        return 1.0 - step / total_steps


def train(state: State, until: int) -> list[Step]:
    steps = training_steps(state, Falling(), total_steps=10, clip_grad_norm=1.0, device=torch.device("cpu"))
    return list(itertools.islice(steps, until - state.step))


def flat(node: Any, path: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        return {k: v for key, value in node.items() for k, v in flat(value, f"{path}/{key}").items()}
    if isinstance(node, list | tuple):
        return flat(dict(enumerate(node)), path)
    return {path: node}


def assert_bitwise(found: Any, expected: Any) -> None:
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize(
    ("method", "optimizer", "precision", "checkpointing"),
    [
        *((method, optimizer, "fp32", False) for method in METHODS for optimizer in OPTIMIZERS),
        ("qlora", "adamw8bit", "bf16", False),
        ("full", "adamw", "bf16", False),
        ("lora", "adamw", "fp32", True),
    ],
)
@pytest.mark.parametrize("stop", [1, 4, 7])  # 4 windows an epoch: within the first, at its end, within the second
def test_stopped_and_continued_is_never_stopped(
    method: str, optimizer: str, precision: str, checkpointing: bool, stop: int, tmp_path: Path
) -> None:
    whole = fresh_state(method, optimizer, precision, checkpointing=checkpointing)
    expected = train(whole, 10)

    first = fresh_state(method, optimizer, precision, checkpointing=checkpointing)
    before = train(first, stop)
    first.before, first.val_loss_before = ["text"], 4.5
    checkpoints = Checkpoints("auto", None, 1)
    folder = checkpoints.save(tmp_path, first)
    assert folder == tmp_path / "checkpoints" / f"step-{stop:08d}"
    del first

    second = fresh_state(method, optimizer, precision, checkpointing=checkpointing)
    torch.manual_seed(12345)  # the new process is somewhere else in its random numbers
    assert checkpoints.restore(tmp_path, second, 10)
    assert (second.step, second.before, second.val_loss_before) == (stop, ["text"], 4.5)
    after = train(second, 10)

    numbers = [(step.number, step.loss, step.grad_norm, step.lr, step.tokens) for step in expected]
    assert [(s.number, s.loss, s.grad_norm, s.lr, s.tokens) for s in before + after] == numbers
    assert_bitwise(trainable_tensors(second), trainable_tensors(whole))
    assert_bitwise(second.optimizer.state_dict(), whole.optimizer.state_dict())
    assert second.batches.state_dict() == whole.batches.state_dict()
    assert second.tokens == whole.tokens
    kinds = {v.dtype for v in flat(whole.optimizer.state_dict()).values() if isinstance(v, Tensor) and v.numel() > 256}
    assert (torch.uint8 in kinds) is (optimizer == "adamw8bit")  # the 8-bit state is really there
    start = trainable_tensors(fresh_state(method, optimizer, precision))
    assert all(not torch.equal(start[name], tensor) for name, tensor in trainable_tensors(whole).items())


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


def saved(tmp_path: Path, step: int = 2, keep: int = 1) -> tuple[Checkpoints, State]:
    state = fresh_state("lora", "adamw")
    train(state, step)
    checkpoints = Checkpoints("auto", None, keep)
    checkpoints.save(tmp_path, state)
    return checkpoints, state


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    state, checkpoints = fresh_state("lora", "adamw"), Checkpoints("auto", 1, 2)
    for step in (1, 2, 3, 4):
        train(state, step)
        checkpoints.save(tmp_path, state)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    assert [step for step in range(1, 7) if Checkpoints("auto", 3, 1).due(step)] == [3, 6]
    assert not any(Checkpoints("auto", None, 1).due(step) for step in range(1, 7))


def test_nothing_of_the_frozen_base_is_kept(tmp_path: Path) -> None:
    _, state = saved(tmp_path)
    trained = sum(p.numel() * 4 for p in state.model.parameters() if p.requires_grad)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size < 3 * trained + 60_000  # weights, two moments, names and the random state


def test_a_folder_without_checkpoints_is_a_fresh_start(tmp_path: Path) -> None:
    state = fresh_state("lora", "adamw")
    assert not Checkpoints("auto", None, 1).restore(tmp_path, state, 10)
    assert state.step == 0


def test_what_broke_off_while_it_was_written_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, state = saved(tmp_path)
    train(state, 3)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tuner.checkpoint.default.torch.save", full)
    with pytest.raises(CheckpointError, match=r"step-00000003: cannot be written: .*No space left"):
        checkpoints.save(tmp_path, state)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    monkeypatch.setattr("tuner.checkpoint.default._flush", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path, state)
    monkeypatch.undo()
    again = fresh_state("lora", "adamw")
    assert checkpoints.restore(tmp_path, again, 10)
    assert again.step == 2
    checkpoints.save(tmp_path, state)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("name", ["trainable.safetensors", "training.pt"])
@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, kept: int) -> None:
    checkpoints, _ = saved(tmp_path)
    file = tmp_path / "checkpoints" / "step-00000002" / name
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{name}: damaged") as caught:
        checkpoints.restore(tmp_path, fresh_state("lora", "adamw"), 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["trainable.safetensors", "training.pt"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    checkpoints, _ = saved(tmp_path)
    (tmp_path / "checkpoints" / "step-00000002" / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: damaged"):
        checkpoints.restore(tmp_path, fresh_state("lora", "adamw"), 10)


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path)
    with pytest.raises(CheckpointError, match="made with other trainable parameters: model"):
        checkpoints.restore(tmp_path, fresh_state("full", "adamw"), 10)
    wider = fresh_state("lora", "adamw")
    for module in wider.model.modules():
        if hasattr(module, "A"):
            module.A = nn.Parameter(torch.zeros(module.A.shape[0] + 1, module.A.shape[1]))
    with pytest.raises(CheckpointError, match=r"other trainable parameters: .*\.A is \[16, 32\], not \[17, 32\]"):
        checkpoints.restore(tmp_path, wider, 10)


def test_a_disk_without_room_is_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = fresh_state("full", "adamw")
    weights = sum(p.numel() * p.element_size() for p in state.model.parameters())
    assert results_bytes(state.model) == weights
    enough = weights * 3 + weights  # fp32 weights and two moments as large, and the model once more at the end
    for free, refused in ((enough - 1, True), (enough, False)):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr("tuner.checkpoint.default.shutil.disk_usage", lambda path, usage=usage: usage)
        with (
            pytest.raises(CheckpointError, match=r"no room for a checkpoint and the results: they may take .* MiB and")
            if refused
            else nullcontext()
        ):
            Checkpoints("auto", None, 1).require_room(tmp_path / "not" / "there", state, results_bytes(state.model))
    lora = fresh_state("lora", "adamw").model
    assert results_bytes(lora) == sum(p.numel() * 4 for p in lora.parameters() if p.requires_grad)
    assert not list(tmp_path.iterdir())


def test_garbled_bytes_are_one_line_that_names_the_checkpoint_before(tmp_path: Path) -> None:
    state, checkpoints = fresh_state("lora", "adamw"), Checkpoints("auto", 1, 2)
    for step in (1, 2):
        train(state, step)
        checkpoints.save(tmp_path, state)
    older, newest = whole_checkpoints(tmp_path)
    whole = (newest / "training.pt").read_bytes()
    pickled = whole.index(b"optimizer")
    incomplete = io.BytesIO()
    torch.save({"step": 2}, incomplete)
    for damaged in (
        b"no checkpoint at all",  # read as a pickle: UnpicklingError
        whole[:pickled] + b"\x00" * 40 + whole[pickled + 40 :],
        whole[: pickled - 5] + b"." + whole[pickled - 4 :],  # the pickle ends early, with an empty dictionary
        incomplete.getvalue(),
    ):
        (newest / "training.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(tmp_path, fresh_state("lora", "adamw"), 10)
        said = str(caught.value)
        assert said.startswith(f"{newest}/training.pt: damaged: ")
        assert said.endswith(f"; to continue from {older}, remove {newest}")
        assert "\n" not in said
    shutil.rmtree(newest)
    again = fresh_state("lora", "adamw")
    assert checkpoints.restore(tmp_path, again, 10)
    assert again.step == 1


def test_other_data_is_refused_by_its_fingerprint(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path)
    other = fresh_state("lora", "adamw", fingerprint="y")
    with pytest.raises(CheckpointError, match=r"the data is not what this run began with: .* was x and is y"):
        checkpoints.restore(tmp_path, other, 10)


def test_fewer_steps_than_were_done_are_refused(tmp_path: Path) -> None:
    checkpoints, _ = saved(tmp_path, step=4)
    with pytest.raises(CheckpointError, match=r"has done 4 steps and 3 are asked for; say train\.max_steps=4 or more"):
        checkpoints.restore(tmp_path, fresh_state("lora", "adamw"), 3)
    assert checkpoints.restore(tmp_path, fresh_state("lora", "adamw"), 4)


@pytest.mark.parametrize("then", ["restore", "save"])
def test_what_a_killed_save_left_is_taken_away(tmp_path: Path, then: str) -> None:
    checkpoints, state = saved(tmp_path)
    left = tmp_path / "checkpoints" / ".step-00000001.unfinished"
    left.mkdir()
    (left / "trainable.safetensors").write_bytes(bytes(1000))
    if then == "restore":
        checkpoints.restore(tmp_path, fresh_state("lora", "adamw"), 10)
    else:
        train(state, 3)
        checkpoints.save(tmp_path, state)
    assert not left.exists()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
