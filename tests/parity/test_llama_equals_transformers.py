"""Folders written by transformers: logits, loss and every gradient as transformers computes them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tuner
from tuner.loop import backward
from tuner.models import attention
from tuner.models.folder import save_weights
from tuner.models.llama import LlamaConfig
from tuner.models.rope import rope_frequencies
from tuner.results import plain_tensors
from tuner.types import Batch

SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one key head": {"num_key_value_heads": 1},
    "as many key heads": {"num_key_value_heads": 6},
    "head_dim apart": {"hidden_size": 40, "num_attention_heads": 4, "head_dim": 14},
    "odd and tied": {"vocab_size": 1009, "hidden_size": 36, "intermediate_size": 51, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention bias": {"attention_bias": True},
    "long wavelengths": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "rms_norm_eps": 1e-3},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 500_000.0},
    "llama3, all kept": {**LLAMA3, "original_max_position_embeddings": 10**9, "rope_theta": 700.0},
    "llama3, all scaled": {**LLAMA3, "original_max_position_embeddings": 2, "rope_theta": 700.0},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)

FP32_LOGITS = 1e-4
"""Logits reach 10 to 20 here and both sides sum some hundred products a layer in another order: a few ulp of 2e-6."""
FP32_GRADIENT = 2e-5
"""Of the largest entry of a gradient: some ten ulp (1.2e-7) of the sums behind it."""

Folder = Callable[..., Path]
Reference = Callable[..., Any]
Padded = Callable[..., tuple[Batch, Tensor]]


def trained(folder: Path, batch: Batch, dtype: torch.dtype = torch.float32) -> tuple[float, dict[str, Tensor]]:
    """Loss and all gradients of full training, by checkpoint name."""
    model = tuner.load_model(folder, dtype=dtype).requires_grad_(True).train()
    loss = backward(model, [batch])
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], of_largest: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0, name
        difference = (ours[name] - gradient).abs().max() / gradient.abs().max()
        assert difference <= of_largest, (name, float(difference))


@shapes
def test_logits_of_padded_batches(
    shape: dict[str, Any], llama_folder: Folder, reference: Reference, padded: Padded
) -> None:
    folder = llama_folder(**shape)
    theirs, ours = reference(folder), tuner.load_model(folder, dtype=torch.float32)
    batch, mask = padded(theirs.config.vocab_size)
    with torch.no_grad():
        expected = theirs(batch.tokens, attention_mask=mask.long()).logits[mask]
        found = ours(batch.tokens)[mask]
    assert found.shape == (int(mask.sum()), theirs.config.vocab_size)
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= FP32_LOGITS


@shapes
def test_loss_and_the_gradient_of_every_parameter(
    shape: dict[str, Any], llama_folder: Folder, reference: Reference, padded: Padded
) -> None:
    folder = llama_folder(**shape)
    theirs = reference(folder).train()
    batch, mask = padded(theirs.config.vocab_size)
    expected = theirs(batch.tokens, attention_mask=mask.long(), labels=batch.labels).loss
    expected.backward()
    loss, gradients = trained(folder, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(gradients, {name: p.grad for name, p in theirs.named_parameters()}, FP32_GRADIENT)


@shapes
def test_explicit_and_fused_attention_agree(
    shape: dict[str, Any], llama_folder: Folder, padded: Padded, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, _ = padded(131)
    assert batch.tokens.shape[1] <= attention.EXPLICIT_MAX_TOKENS
    explicit_loss, explicit = trained(llama_folder(**shape), batch)
    used = []

    def fused(*qkv: Tensor) -> Tensor:
        used.append(1)
        return attention.sdpa_causal_attention(*qkv)

    monkeypatch.setattr("tuner.models.llama.causal_attention_for", lambda device_type: fused)
    fused_loss, gradients = trained(llama_folder(**shape), batch)
    assert len(used) == 3  # layers
    assert fused_loss == pytest.approx(explicit_loss, rel=1e-6)
    assert_same_gradients(explicit, gradients, FP32_GRADIENT)


@shapes
def test_bf16_is_as_close_to_fp32_as_transformers(
    shape: dict[str, Any], llama_folder: Folder, reference: Reference, padded: Padded
) -> None:
    folder = llama_folder(**shape)
    batch, mask = padded(131, lengths=(64, 50, 64, 41))
    with torch.no_grad():
        exact = reference(folder)(batch.tokens).logits[mask]
        theirs = reference(folder, torch.bfloat16)(batch.tokens).logits[mask].float()
        found = tuner.load_model(folder, dtype=torch.bfloat16)(batch.tokens)[mask]
    assert found.dtype == torch.bfloat16
    ours_off, theirs_off = (found - exact).square().mean().sqrt(), (theirs - exact).square().mean().sqrt()
    # Two orders of the same sums round to equally large errors, not to equal ones; 219 rows leave some chance.
    assert ours_off <= 1.15 * theirs_off
    assert ours_off <= 0.03 * exact.std()  # bf16 keeps 8 bits, some dozen roundings in a row


def test_bf16_gradients_are_as_close_to_fp32_as_transformers(
    llama_folder: Folder, reference: Reference, padded: Padded
) -> None:
    folder = llama_folder()
    batch, mask = padded(131, lengths=(64, 50, 64, 41))
    _, exact = trained(folder, batch)
    theirs = reference(folder, torch.bfloat16).train()
    theirs(batch.tokens, attention_mask=mask.long(), labels=batch.labels).loss.backward()
    _, ours = trained(folder, batch, torch.bfloat16)
    for name, parameter in theirs.named_parameters():
        ours_off, theirs_off = (ours[name] - exact[name]).norm(), (parameter.grad - exact[name]).norm()
        assert ours_off <= 1.3 * theirs_off, name  # the smallest have 48 entries: chance is larger than for logits
        assert ours_off <= 0.1 * exact[name].norm(), name


scalings = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)


def spell_as_in_version_4(folder: Path) -> None:
    """`rope_theta` and `rope_scaling` side by side, as every Llama 3.1 and 3.2 folder has them."""
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))


@scalings
@pytest.mark.parametrize("version", [4, 5])
def test_scaled_rotary_positions(
    scaling: dict[str, Any], version: int, llama_folder: Folder, reference: Reference, tmp_path: Path
) -> None:
    """Over 16 times the context that the wavelengths were made for, in both spellings, and saved again."""
    folder = Path(shutil.copytree(llama_folder(rope_parameters=scaling, max_position_embeddings=1024), tmp_path / "a"))
    if version == 4:
        spell_as_in_version_4(folder)
    tokens = torch.randint(0, 131, (1, 1024), generator=torch.Generator().manual_seed(2))
    theirs, ours = reference(folder), tuner.load_model(folder, dtype=torch.float32)
    assert theirs.config.rope_parameters["rope_type"] == scaling["rope_type"]
    frequencies = rope_frequencies(8, scaling["rope_theta"], ours.config.rope_scaling, None)
    assert torch.equal(frequencies, theirs.model.rotary_emb.inv_freq)
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    assert (found - expected).abs().max() <= FP32_LOGITS
    unscaled = replace(ours.config, rope_scaling=None)
    with torch.no_grad():
        ours.config = unscaled
        if scaling.get("original_max_position_embeddings") != 10**9:
            assert (ours(tokens) - expected).abs().max() > 100 * FP32_LOGITS

    save_weights(
        tmp_path / "b",
        LlamaConfig.from_hugging_face(json.loads((folder / "config.json").read_text()), None).to_hugging_face(),
        plain_tensors(ours),
    )
    with torch.no_grad():
        assert torch.equal(tuner.load_model(tmp_path / "b", dtype=torch.float32)(tokens), found)
        assert torch.equal(reference(tmp_path / "b")(tokens).logits, expected)


def test_scaled_frequencies_at_the_positions_of_llama_3_1() -> None:
    """Kept, blended and divided pairs all occur with the settings that Llama 3.1 8B has."""
    scaling = {**LLAMA3, "original_max_position_embeddings": 8192}
    plain, scaled = (rope_frequencies(128, 500_000.0, one, None) for one in (None, scaling))
    ratio = plain / scaled
    kept, divided = ratio == 1.0, ratio == 8.0
    assert (int(kept.sum()), int(divided.sum())) == (29, 29)
    assert torch.equal(kept, 2 * math.pi / plain <= 8192 / 4)
    assert torch.equal(divided, 2 * math.pi / plain >= 8192 / 1)
    assert ((ratio > 1.0) & (ratio < 8.0)).sum() == 64 - 58
