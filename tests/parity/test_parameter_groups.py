"""Groups of parameters as others make them: LoRA+ of PEFT, and what Hugging Face's Trainer does not decay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tuner
from tuner.models.decoder import Decoder
from tuner.models.family import FAMILIES
from tuner.optimizers.adamw import adamw
from tuner.optimizers.groups import trained
from tuner.peft.lora import LoRA

Folder = Callable[..., Path]
Reference = Callable[..., Any]

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 8, "attention_bias": True},
}
"""With all the biases and norms that a family has."""


def loaded(folder: Path) -> Decoder:
    model = tuner.load_model(folder, dtype=torch.float32)
    assert isinstance(model, Decoder)
    return model


@pytest.mark.slow  # importing the Trainer takes seconds
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_biases_are_what_hugging_face_does_not_decay(
    family: str, family_folder: Folder, reference: Reference
) -> None:
    from transformers import Trainer

    folder = family_folder(family, **SHAPES.get(family, {}))
    theirs = reference(folder)
    decayed = Trainer.get_decay_parameter_names(None, theirs)  # it reads nothing of the trainer
    expected = {name for name, _ in theirs.named_parameters() if name not in decayed}
    found = {one.name for one in trained(loaded(folder).requires_grad_(True)) if one.role in ("norms", "biases")}
    assert found == expected
    assert any("norm" in name for name in found)


ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def their_name(ours: str) -> str:
    """What PEFT calls a parameter of ours: of an adapter, of an adapted layer, or of another."""
    for leaf, of_peft in (
        (".adapters.default.A", ".lora_A.default.weight"),
        (".adapters.default.B", ".lora_B.default.weight"),
    ):
        ours = ours.replace(leaf, of_peft)
    return f"base_model.model.{ours.replace('.base.', '.base_layer.')}"


def both(folder: Path, reference: Reference) -> tuple[dict[str, nn.Parameter], Decoder, Any]:
    """PEFT's parameters by our names, our model and PEFT's, of equal weights; adapters, norms and biases train."""
    from peft import LoraConfig, get_peft_model

    model = loaded(folder)
    LoRA("lora", 4, 8, 0.0, ["q_proj", "k_proj", "v_proj", "output_proj"], True, False, False).adapt(model)
    peft = get_peft_model(reference(folder), LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, *MLP]))
    for part in (model, peft):
        for param in part.parameters():
            param.requires_grad_(param.requires_grad or param.dim() == 1)
    of_peft = {name: param for name, param in peft.named_parameters() if param.requires_grad}
    theirs = {one.name: of_peft.pop(their_name(one.name)) for one in trained(model)}
    assert not of_peft
    with torch.no_grad():
        for one in trained(model):
            theirs[one.name].copy_(one.param)
    return theirs, model, peft


def test_lora_plus_has_the_groups_of_peft_and_steps_to_the_same_weights(
    llama_folder: Folder, reference: Reference
) -> None:
    from peft.optimizers import create_loraplus_optimizer

    theirs, model, peft = both(llama_folder(attention_bias=True), reference)
    ours = {one.name: one.param for one in trained(model)}
    keys = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "fused": True}
    optimizer = adamw(
        trained(model),
        **{**keys, "betas": [0.8, 0.9]},
        weight_decay=0.3,
        loraplus_lr_ratio=16.0,
        no_decay=["biases"],  # norms that are not LayerNorm decay in PEFT's
    )
    expected = create_loraplus_optimizer(
        peft, torch.optim.AdamW, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.3, **keys
    )
    assert settings(optimizer, ours) == settings(expected, theirs)
    assert len(set(settings(optimizer, ours).values())) == 3
    assert optimizer.param_groups[0]["lr"] == 0.01

    start = {name: param.detach().clone() for name, param in ours.items()}
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        for name, param in ours.items():
            param.grad = torch.randn(param.shape, generator=generator)
            theirs[name].grad = param.grad.clone()
        optimizer.step()
        expected.step()
    assert all(torch.equal(param, theirs[name]) for name, param in ours.items())
    assert not any(torch.equal(param, start[name]) for name, param in ours.items())


def settings(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter]) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter by name."""
    names = {id(param): name for name, param in params.items()}
    return {
        names[id(param)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for param in group["params"]
    }
