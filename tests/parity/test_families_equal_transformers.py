"""Folders written by transformers, of every family: logits, loss and every gradient as transformers computes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tuner
from tuner.data.batches import collate, collate_packed
from tuner.loop import backward, evaluate
from tuner.models import attention
from tuner.models.attention import Scoring
from tuner.models.decoder import Decoder
from tuner.models.documents import Documents
from tuner.models.family import FAMILIES
from tuner.models.stored import stored_parts, stored_tensors
from tuner.models.writing import save_weights
from tuner.types import IGNORE, Batch, Sample

FACTORS = [1.0 + 0.25 * i for i in range(4)]
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "grouped queries": {},
        "one key head": {"num_key_value_heads": 1},
        "as many key heads": {"num_key_value_heads": 6},
        "head_dim apart": {"hidden_size": 40, "num_attention_heads": 4, "head_dim": 14},
        "odd and tied": {"vocab_size": 1009, "hidden_size": 36, "intermediate_size": 51, "tie_word_embeddings": True},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "attention bias": {"attention_bias": True},
        "long wavelengths": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
            "rms_norm_eps": 1e-3,
        },
    },
    "mistral": {
        "no window": {"sliding_window": None, "head_dim": 14},
        "window": {"sliding_window": 9},
        "window and tied": {"sliding_window": 5, "vocab_size": 1009, "tie_word_embeddings": True},
    },
    "gemma": {
        "grouped queries": {"head_dim": 14, "tie_word_embeddings": True},
        "one key head": {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 1009, "tie_word_embeddings": True},
        "untied with biases": {"head_dim": 8, "attention_bias": True},
    },
    "gemma2": {
        "windows": {"head_dim": 14, "sliding_window": 9, "query_pre_attn_scalar": 20, "tie_word_embeddings": True},
        "low caps": {
            "head_dim": 8,
            "sliding_window": 300,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
        "no caps, untied, biases": {
            "head_dim": 8,
            "sliding_window": 9,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
        },
        "types of layers": {
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    },
    "phi3": {
        "no window": {"sliding_window": None},
        "window": {"sliding_window": 9, "num_key_value_heads": 3},
        "long rope within its first context": {
            "rope_parameters": {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1]},
            "original_max_position_embeddings": 40,
        },
        "long rope beyond it": {
            "rope_parameters": {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1]},
            "original_max_position_embeddings": 20,
        },
    },
    "qwen2": {
        "untied": {},
        "tied": {"tie_word_embeddings": True, "vocab_size": 1009, "hidden_size": 36, "intermediate_size": 51},
        "windows": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        "head_dim apart": {"hidden_size": 40, "num_attention_heads": 4, "head_dim": 14},
    },
    "qwen3": {
        "untied": {"head_dim": 14},
        "tied": {"head_dim": 8, "tie_word_embeddings": True, "vocab_size": 1009},
        "windows and biases": {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
    },
}
CASES = [
    pytest.param(family, shape, id=f"{family}, {name}")
    for family in FAMILIES
    for name, shape in SHAPES.get(family, {"plain": {}}).items()
]
cases = pytest.mark.parametrize(("family", "shape"), CASES)
PLAIN = [pytest.param(family, next(iter(SHAPES.get(family, {"plain": {}}).values())), id=family) for family in FAMILIES]

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
    return loss, stored_gradients(model)


def stored_gradients(model: nn.Module) -> dict[str, Tensor]:
    assert isinstance(model, Decoder)
    parameters = dict(model.named_parameters())
    return {
        stored: torch.cat([parameters[part].grad for part in parts])  # type: ignore[misc]
        for stored, parts in stored_parts(model).items()
    }


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], of_largest: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0, name
        difference = (ours[name] - gradient).abs().max() / gradient.abs().max()
        assert difference <= of_largest, (name, float(difference))


@cases
def test_logits_of_padded_batches(
    family: str, shape: dict[str, Any], family_folder: Folder, reference: Reference, padded: Padded
) -> None:
    folder = family_folder(family, **shape)
    theirs, ours = reference(folder), tuner.load_model(folder, dtype=torch.float32)
    batch, mask = padded(theirs.config.vocab_size)
    with torch.no_grad():
        expected = theirs(batch.tokens, attention_mask=mask.long()).logits[mask]
        found = ours(batch.tokens)[mask]
    assert found.shape == (int(mask.sum()), theirs.config.vocab_size)
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= FP32_LOGITS


@cases
def test_loss_and_the_gradient_of_every_parameter(
    family: str, shape: dict[str, Any], family_folder: Folder, reference: Reference, padded: Padded
) -> None:
    folder = family_folder(family, **shape)
    theirs = reference(folder).train()
    batch, mask = padded(theirs.config.vocab_size)
    expected = theirs(batch.tokens, attention_mask=mask.long(), labels=batch.labels).loss
    expected.backward()
    loss, gradients = trained(folder, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(gradients, {name: p.grad for name, p in theirs.named_parameters()}, FP32_GRADIENT)


@cases
def test_explicit_and_fused_attention_agree(
    family: str, shape: dict[str, Any], family_folder: Folder, padded: Padded, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, _ = padded(131)
    assert batch.tokens.shape[1] <= attention.EXPLICIT_MAX_TOKENS[torch.float32]
    folder = family_folder(family, **shape)
    explicit_loss, explicit = trained(folder, batch)
    used = []

    def fused(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, visible: Tensor | None) -> Tensor:
        used.append(1)
        return attention.sdpa_attention(q, k, v, scoring, visible)

    monkeypatch.setattr("tuner.models.decoder.attention_for", lambda device_type: fused)
    fused_loss, gradients = trained(folder, batch)
    assert len(used) == 3  # layers
    assert fused_loss == pytest.approx(explicit_loss, rel=1e-6)
    assert_same_gradients(explicit, gradients, FP32_GRADIENT)


@cases
def test_bf16_is_as_close_to_fp32_as_transformers(
    family: str, shape: dict[str, Any], family_folder: Folder, reference: Reference, padded: Padded
) -> None:
    folder = family_folder(family, **shape)
    batch, mask = padded(131, lengths=(64, 50, 64, 41))
    with torch.no_grad():
        exact = reference(folder)(batch.tokens).logits[mask]
        theirs = reference(folder, torch.bfloat16)(batch.tokens).logits[mask].float()
        found = tuner.load_model(folder, dtype=torch.bfloat16)(batch.tokens)[mask]
    assert found.dtype == torch.bfloat16
    ours_off, theirs_off = (found - exact).square().mean().sqrt(), (theirs - exact).square().mean().sqrt()
    # Two orders of the same sums round to equally large errors, not to equal ones; 219 rows leave some chance.
    assert ours_off <= 1.15 * theirs_off
    # bf16 keeps 8 bits, some dozen roundings in a row; with long rope both are off by somewhat more.
    of_spread = 0.04 if family == "phi3" and "rope_parameters" in shape else 0.03
    assert ours_off <= of_spread * exact.std()


@pytest.mark.parametrize(("family", "shape"), PLAIN)
def test_bf16_gradients_are_as_close_to_fp32_as_transformers(
    family: str, shape: dict[str, Any], family_folder: Folder, reference: Reference, padded: Padded
) -> None:
    folder = family_folder(family, **shape)
    batch, mask = padded(131, lengths=(64, 50, 64, 41))
    _, exact = trained(folder, batch)
    theirs = reference(folder, torch.bfloat16).train()
    theirs(batch.tokens, attention_mask=mask.long(), labels=batch.labels).loss.backward()
    _, ours = trained(folder, batch, torch.bfloat16)
    relative: list[tuple[float, float]] = []
    for name, parameter in theirs.named_parameters():
        ours_off, theirs_off = (ours[name] - exact[name]).norm(), (parameter.grad - exact[name]).norm()
        assert ours_off <= 0.1 * exact[name].norm(), name
        if parameter.numel() >= 48:  # of fewer entries, as a norm of 8, the comparison is a matter of chance
            assert ours_off <= 1.3 * theirs_off, name
        relative.append((float(ours_off / exact[name].norm()), float(theirs_off / exact[name].norm())))
    ours_all, theirs_all = torch.tensor(relative).square().mean(0).sqrt()
    assert ours_all <= 1.15 * theirs_all


DOCUMENTS = [[11, 1, 21], [33], [7, 13, 6, 7]]
"""Lengths of the documents of three rows of 33 tokens, one of them a single token."""


@cases
def test_packed_rows_with_a_document_mask(
    family: str, shape: dict[str, Any], family_folder: Folder, reference: Reference
) -> None:
    """Logits, loss and gradients: transformers finds the documents by positions that begin again."""
    folder = family_folder(family, **shape)
    theirs = reference(folder).train()
    model = tuner.load_model(folder, dtype=torch.float32).requires_grad_(True).train()
    assert isinstance(model, Decoder)
    tokens = torch.randint(0, theirs.config.vocab_size, (3, 33), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
    expected = theirs(tokens, position_ids=positions, use_cache=False).logits
    found = model(tokens, DOCUMENTS)
    assert (found - expected).abs().max() <= FP32_LOGITS
    for row, columns in ((0, slice(11, 12)), (2, slice(7, 20))):  # a document is what it is alone
        if family == "phi3" and "original_max_position_embeddings" in shape:
            continue  # which factors count is decided by the longest document of a batch
        alone = model(tokens[row : row + 1, columns])
        assert (found[row, columns] - alone[0]).abs().max() <= FP32_LOGITS
    targets = torch.where(positions[:, 1:] > 0, tokens[:, 1:], -100).flatten()
    losses = [nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets) for logits in (found, expected)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    assert_same_gradients(
        stored_gradients(model), {name: p.grad for name, p in theirs.named_parameters()}, FP32_GRADIENT
    )


@cases
def test_a_packed_batch_has_the_loss_and_gradients_of_its_documents_unpacked(
    family: str, shape: dict[str, Any], family_folder: Folder
) -> None:
    """Rows are longer than `longrope`'s first context of 40 tokens, documents are not: it is documents that count."""
    folder = family_folder(family, **shape)
    draws = torch.Generator().manual_seed(3)
    rows = [[drawn_sample(length, draws) for length in row] for row in ([11, 1, 21, 9, 3], [33, 12], [7, 13, 6, 7])]
    documents = [sample for row in rows for sample in row]
    packed, unpacked = collate_packed(rows, pad_id=1), collate(documents, pad_id=0)
    assert packed.tokens.shape == (3, 45)
    assert packed.num_trained == unpacked.num_trained
    loss, gradients = trained(folder, packed)
    expected_loss, expected = trained(folder, unpacked)
    assert loss == pytest.approx(expected_loss, abs=1e-5, rel=0)
    assert_same_gradients(gradients, expected, FP32_GRADIENT)
    model = tuner.load_model(folder, dtype=torch.float32)
    assert evaluate(model, [packed], torch.device("cpu")) == pytest.approx(expected_loss, abs=1e-5, rel=0)
    if "original_max_position_embeddings" not in shape:  # which factors count is decided by the longest of a batch
        alone = [collate([sample], pad_id=0) for sample in documents]
        assert evaluate(model, alone, torch.device("cpu")) == pytest.approx(loss, abs=1e-5, rel=0)


def drawn_sample(length: int, draws: torch.Generator) -> Sample:
    """Random tokens; all but the first 3 are trained on, or all of a text that is no longer."""
    tokens = torch.randint(0, 131, (length,), generator=draws).tolist()
    return Sample(tokens, tokens if length <= 3 else [IGNORE] * 3 + tokens[3:])


def test_documents_that_are_no_division_of_the_rows_are_refused() -> None:
    cpu = torch.device("cpu")
    for lengths in ([[5, 5]], [[5, 6], [3]], [[5, 0], [3]], [[3], [-1, 4]]):
        with pytest.raises(ValueError, match="no division of 2 rows of 10 tokens"):
            Documents(lengths, (2, 10), cpu)
    assert Documents([[5, 5], []], (2, 10), cpu).positions.tolist() == [[[*range(5), *range(5)]], [[0] * 10]]


@cases
def test_what_is_saved_loads_bitwise_in_transformers(
    family: str, shape: dict[str, Any], family_folder: Folder, reference: Reference, tmp_path: Path
) -> None:
    folder = family_folder(family, **shape)
    model = tuner.load_model(folder, dtype=torch.float32)
    assert isinstance(model, Decoder)
    config = json.loads((folder / "config.json").read_text())
    save_weights(tmp_path, {**config, **model.config.to_hugging_face()}, stored_tensors(model))
    original, saved = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert original.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in original.items())
    theirs = reference(tmp_path)
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, reference(folder)(tokens).logits)
        again = tuner.load_model(tmp_path, dtype=torch.float32)(tokens)
        assert torch.equal(again, model(tokens))
    written = json.loads((tmp_path / "config.json").read_text())
    version_4 = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    (tmp_path / "config.json").write_text(json.dumps(version_4))
    with torch.no_grad():
        assert torch.equal(tuner.load_model(tmp_path, dtype=torch.float32)(tokens), again)
        assert torch.equal(reference(tmp_path)(tokens).logits, theirs(tokens).logits)
