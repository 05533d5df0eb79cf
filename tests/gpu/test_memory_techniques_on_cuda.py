"""Memory techniques on a GPU: the gradients of none of them, and less memory allocated at most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.build import build_model, load_base
from tuner.loop import add_gradients
from tuner.memory.default import MemoryTechniques
from tuner.models.decoder import Decoder
from tuner.models.llama import LlamaConfig
from tuner.peft.full import Full
from tuner.peft.lora import LoRA
from tuner.types import Batch, Precision

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
T = 1024
TECHNIQUES = {
    "none": ("none", False),
    "selective": ("selective", False),
    "full": ("full", False),
    "offloaded": ("none", True),
    "full-offloaded": ("full", True),
}


def built(method: str, technique: str, dtype: str, *, in_backward: bool = False) -> tuple[Decoder, MemoryTechniques]:
    base = load_base(LlamaConfig.from_hugging_face(SHAPE, None), getattr(torch, dtype), torch.device("cuda"), 0)
    torch.manual_seed(0)
    lora = LoRA("lora", 8, 16, 0.0, ["q_proj", "k_proj", "v_proj", "output_proj"], True, False, False)
    checkpointing, offloading = TECHNIQUES[technique]
    memory = MemoryTechniques(checkpointing, offloading, in_backward)  # type: ignore[arg-type]
    memory.require(torch.device("cuda"))
    peft = Full("full") if method == "full" else lora
    model = build_model(base, peft, Precision(dtype, dtype), memory)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.02)
    return model, memory


def measured(
    method: str, technique: str, dtype: str, documents: list[list[int]] | None
) -> tuple[dict[str, Tensor], int]:
    """Loss and gradients of the second of two passes, whose memory is warm, and the most bytes beyond the model's."""
    model, _ = built(method, technique, dtype)
    tokens = torch.randint(0, 512, (4, T), generator=torch.Generator().manual_seed(1)).cuda()
    batch = Batch(tokens, tokens, documents=documents)
    for _ in range(2):
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (loss,) = add_gradients(model, [batch])
        torch.cuda.synchronize()
    found = {"loss": loss, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
    return found, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("documents", [None, [[600, 400]] * 4], ids=["texts", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_same_gradients_in_less_memory(method: str, dtype: str, documents: list[list[int]] | None) -> None:
    plain, most = measured(method, "none", dtype, documents)
    bytes_of = {"none": most}
    for technique in [name for name in TECHNIQUES if name != "none"]:
        found, bytes_of[technique] = measured(method, technique, dtype, documents)
        assert found.keys() == plain.keys()
        for name, value in plain.items():
            # The same kernels on the same numbers; those of attention and embeddings add in no fixed order.
            assert (found[name] - value).norm() <= (1e-5 if dtype == "float32" else 2e-2) * value.norm(), (
                technique,
                name,
            )
    assert bytes_of["full"] < bytes_of["selective"] < bytes_of["none"]
    assert bytes_of["offloaded"] < 0.7 * bytes_of["none"]
    assert bytes_of["full-offloaded"] < bytes_of["full"]


def test_offloaded_memory_is_right_when_copies_are_slower_than_the_computation() -> None:
    """Many passes without a synchronisation between them: memory that is given up early would be written over."""
    expected = gradients_of_many("none")
    for found, value in zip(gradients_of_many("offloaded"), expected, strict=True):
        assert (found - value).norm() <= 1e-5 * value.norm()


def gradients_of_many(technique: str) -> list[Tensor]:
    model, _ = built("lora", technique, "float32")
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 512, (2, T), generator=generator).cuda() for _ in range(10)]
    add_gradients(model, [Batch(tokens, tokens) for tokens in batches])
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["AdamW", "PagedAdamW8bit"])
def test_steps_in_backward_equal_those_behind_it_and_hold_one_gradient(name: str) -> None:
    from tuner.optimizers.custom import custom
    from tuner.optimizers.groups import trained

    weights, most = [], []
    for in_backward in (False, True):
        model, memory = built("full", "full", "float32", in_backward=in_backward)
        library = "torch" if name == "AdamW" else "bitsandbytes"
        optimizer = custom(f"{library}.optim.{name}", trained(model), {"lr": 1e-3}, [])
        stepped = memory.steps_in_backward(optimizer, None)
        tokens = torch.randint(0, 512, (1, 64), generator=torch.Generator().manual_seed(1)).cuda()
        for _ in range(3):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            add_gradients(model, [Batch(tokens, tokens)])
            if stepped is None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            else:
                assert torch.isfinite(stepped.grad_norm())
        most.append(torch.cuda.max_memory_allocated() - before)
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        size = sum(p.numel() * 4 for p in model.parameters())
    for key, value in weights[0].items():
        # Adam's steps are of about the rate, also where a gradient is no larger than its rounding.
        assert (weights[1][key] - value).norm() <= 1e-2 * 3 * 1e-3 * value.numel() ** 0.5, key
    assert most[1] < most[0] - 0.7 * size
