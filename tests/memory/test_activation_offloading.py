"""Activation offloading: what is moved, when it comes back, and that nothing else changes.

Here the host is where the tensors are already, so a copy is only a copy; tests/gpu has the way to a GPU and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.build import build_model, load_base
from tuner.errors import ConfigError
from tuner.loop import add_gradients
from tuner.memory.default import MemoryTechniques
from tuner.memory.offloading import AHEAD, Offloading, offload
from tuner.models.decoder import Decoder
from tuner.models.llama import LlamaConfig
from tuner.peft.full import Full
from tuner.peft.lora import LoRA
from tuner.types import Batch, Precision

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Copies:
    """Copies, and counts them."""

    def __init__(self) -> None:
        self.out_bytes: list[int] = []
        self.events: list[tuple[str, int]] = []

    def out(self, device_bytes: Tensor) -> Tensor:
        self.out_bytes.append(device_bytes.numel())
        host = device_bytes.clone()
        host.place = len(self.out_bytes) - 1  # type: ignore[attr-defined]
        return host

    def begin_back(self, host_bytes: Tensor) -> Tensor:
        self.events.append(("begin", host_bytes.place))  # type: ignore[attr-defined]
        return host_bytes

    def end_back(self, begun: Tensor) -> Tensor:
        self.events.append(("end", begun.place))  # type: ignore[attr-defined]
        return begun.clone()


def built(method: str, checkpointing: Any, copies: Copies | None) -> Decoder:
    base = load_base(LlamaConfig.from_hugging_face(SHAPE, None), torch.float32, torch.device("cpu"), 0)
    torch.manual_seed(0)
    attention: Sequence[Any] = ["q_proj", "k_proj", "v_proj", "output_proj"]
    peft = Full("full") if method == "full" else LoRA("lora", 4, 8, 0.1, list(attention), True, False, False)
    memory = MemoryTechniques(checkpointing, False, False, False)
    model = build_model(base, peft, Precision("fp32", "float32"), memory)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.1)
    if copies is not None:
        offload(model, lambda: copies, min_bytes=2048)
    return model


def gradients(model: Decoder) -> dict[str, Tensor]:
    tokens = torch.randint(0, 61, (2, 150), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    (loss,) = add_gradients(model, [Batch(tokens, tokens)])
    return {"loss": loss, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_loss_and_gradients_are_the_same_bits(method: str, checkpointing: str) -> None:
    copies = Copies()
    plain, moved = gradients(built(method, checkpointing, None)), gradients(built(method, checkpointing, copies))
    assert plain.keys() == moved.keys()
    assert len(plain) > 20
    for name, value in plain.items():
        assert torch.equal(moved[name], value), name  # the same operations on the same numbers: no tolerance
    assert len(copies.out_bytes) == len([kind for kind, _ in copies.events if kind == "end"])


def test_of_a_checkpointed_layer_only_its_input_is_moved() -> None:
    copies = Copies()
    gradients(built("lora", "full", copies))
    assert copies.out_bytes == [4 * 2 * 150 * 64] * 4  # fp32 [2, 150, 64] of three layers and the last norm


def test_a_memory_is_moved_once_and_parameters_stay() -> None:
    copies = Copies()
    weight = nn.Parameter(torch.randn(64, 64))
    saved = Offloading([weight], copies, min_bytes=1024)
    x = torch.randn(64, 64)
    small = torch.randn(4)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        # x @ weight saves x and a view of weight; sin and exp save x itself and a view of its other half
        leaf = x.requires_grad_()
        loss = (leaf @ weight.t()).sum() + leaf.sin().sum() + leaf[32:].t().cos().sum() + (small * leaf[0, :4]).sum()
    assert copies.out_bytes == [64 * 64 * 4]
    loss.backward()
    expected = weight.detach().sum(0).expand(64, 64) + x.detach().cos()
    expected[32:] -= x.detach()[32:].sin()
    expected[0, :4] += small
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, expected, atol=1e-5)  # sums of 64 numbers in fp32 in another order


def test_an_address_that_is_used_again_is_another_memory() -> None:
    copies = Copies()
    saved = Offloading([], copies, min_bytes=1)
    memory = bytearray(4000)  # an allocator may or may not give an address twice
    views, addresses = [], set()
    for number in range(8):
        tensor = torch.frombuffer(memory, dtype=torch.float32).fill_(number)
        addresses.add(tensor.untyped_storage().data_ptr())
        views.append(saved.pack(tensor))
        del tensor
    assert len(addresses) == 1
    assert [float(saved.unpack(view)[0]) for view in views] == [float(number) for number in range(8)]


def test_what_will_be_wanted_next_is_on_its_way() -> None:
    copies = Copies()
    saved = Offloading([], copies, min_bytes=1)
    views = [saved.pack(torch.full((10,), float(number))) for number in range(10)]
    while views:
        saved.unpack(views.pop())
    begun = [place for kind, place in copies.events if kind == "begin"]
    assert begun == sorted(begun, reverse=True) == list(range(9, -1, -1))
    for place in range(10 - AHEAD):
        assert copies.events.index(("begin", place)) < copies.events.index(("end", place + AHEAD))


def test_nothing_is_moved_in_evaluation() -> None:
    copies = Copies()
    model = built("full", "none", copies)
    model.eval().hidden(torch.zeros(1, 150, dtype=torch.int64))
    with torch.no_grad():
        model.train().hidden(torch.zeros(1, 150, dtype=torch.int64))
    assert copies.out_bytes == []


def test_it_is_refused_on_a_cpu() -> None:
    with pytest.raises(
        ConfigError, match=r"activation_offloading=true: the run is on the CPU, whose memory they would"
    ):
        MemoryTechniques("none", True, False, False).require(torch.device("cpu"))
    MemoryTechniques("none", True, False, False).require(torch.device("cuda"))
    MemoryTechniques("none", False, False, False).require(torch.device("cpu"))
