"""Mixed precision gives what transformers does under `torch.autocast`: loss and every gradient, of all families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tuner
from tuner.build import compute_in
from tuner.loop import add_gradients
from tuner.models.decoder import Decoder
from tuner.models.family import FAMILIES
from tuner.models.stored import stored_parts
from tuner.precision.amp_bf16 import amp_bf16
from tuner.precision.amp_fp16 import amp_fp16
from tuner.types import Batch, Precision

PRECISIONS = {"amp_bf16": amp_bf16("auto"), "amp_fp16": amp_fp16("auto", 4096.0, 2000)}
UNIT = {"amp_bf16": 2.0**-8, "amp_fp16": 2.0**-11}
"""Half an ulp: the largest relative error of one rounding."""
SHAPES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 14, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 14, "sliding_window": 9, "query_pre_attn_scalar": 20, "tie_word_embeddings": True},
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "phi3": {"sliding_window": None},
    "qwen3": {"head_dim": 14},
}
LOSS = 0.5
"""Units that the loss may be off: errors of single logits average out over 40 trained tokens. Largest found: 0.27."""
FROM_AUTOCAST = 16
"""Units that the gradient of one matrix may be off autocast's (relative norm): either is some ten roundings away from
the exact one, 5 to 15 units for the worst matrix, and they round at other places. Largest found: 11.4."""
SAME_DISTANCE = 0.2
"""By which all together may be further from the exact ones than autocast's are, or nearer. Largest found: 0.12."""


def gradients_of_transformers(model: Any, batch: Batch, mask: Tensor, scale: float) -> tuple[float, dict[str, Tensor]]:
    """By the loss in fp32 of logits in 16 bits, scaled as `torch.amp.GradScaler` would."""
    logits = model(batch.tokens, attention_mask=mask.long()).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten())
    (loss * scale).backward()
    found = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), found


def our_gradients(folder: Path, precision: Precision, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    model = tuner.load_model(folder, dtype=torch.float32).requires_grad_(True).train()
    assert isinstance(model, Decoder)
    compute_in(model, precision)
    scale = precision.initial_loss_scale or 1.0
    (loss,) = add_gradients(model, [batch], scale)
    parameters = dict(model.named_parameters())
    gradients = {
        stored: torch.cat([parameters[part].grad for part in parts])  # type: ignore[misc]
        for stored, parts in stored_parts(model).items()
    }
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    return float(loss), {name: gradient / scale for name, gradient in gradients.items()}


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_autocasts(
    family: str,
    precision: str,
    family_folder: Callable[..., Path],
    reference: Callable[..., Any],
    padded: Callable[..., tuple[Batch, Tensor]],
) -> None:
    folder = family_folder(family, **SHAPES.get(family, {}))
    theirs = reference(folder)
    batch, mask = padded(131)
    mixed, unit = PRECISIONS[precision], UNIT[precision]
    exact_loss, exact = gradients_of_transformers(theirs, batch, mask, 1.0)
    scale = mixed.initial_loss_scale or 1.0
    with torch.autocast("cpu", dtype=getattr(torch, mixed.compute)):
        their_loss, expected = gradients_of_transformers(theirs, batch, mask, scale)
    our_loss, found = our_gradients(folder, mixed, batch)
    assert abs(our_loss - their_loss) <= LOSS * unit * exact_loss
    assert abs(our_loss - exact_loss) <= LOSS * unit * exact_loss
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert off(found[name], gradient) <= FROM_AUTOCAST * unit, name
    all_found, all_expected, all_exact = (
        torch.cat([gradients[name].flatten() for name in exact]) for gradients in (found, expected, exact)
    )
    assert off(all_found, all_exact) == pytest.approx(off(all_expected, all_exact), rel=SAME_DISTANCE)
    assert off(all_expected, all_exact) > unit  # so that the line above says that ours was not computed in fp32
