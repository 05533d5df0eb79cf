"""Rotary positions scaled for a longer context, as transformers computes them, in both spellings of a folder."""

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

import tuner
from tuner.models.llama import LlamaConfig
from tuner.models.rope import rope_frequencies
from tuner.models.stored import stored_tensors
from tuner.models.writing import save_weights

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10_000.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 500_000.0},
    "llama3, all kept": {**LLAMA3, "original_max_position_embeddings": 10**9, "rope_theta": 700.0},
    "llama3, all scaled": {**LLAMA3, "original_max_position_embeddings": 2, "rope_theta": 700.0},
}
FP32_LOGITS = 1e-4
"""Logits reach 10 to 20 here and both sides sum some hundred products a layer in another order: a few ulp of 2e-6."""

Folder = Callable[..., Path]
Reference = Callable[..., Any]


scalings = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)


def spell_as_in_version_4(folder: Path) -> None:
    """`rope_theta` and `rope_scaling` side by side, as every Llama 3.1 and 3.2 folder has them."""
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
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
        stored_tensors(ours),
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
