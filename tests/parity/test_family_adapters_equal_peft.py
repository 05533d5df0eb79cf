"""Adapters of every family against Hugging Face PEFT, the fused matrices of Phi-3 above all."""

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
from tuner.models.decoder import Decoder
from tuner.models.family import FAMILIES
from tuner.peft.adapted import adapted_layers
from tuner.peft.adapter_writing import save_adapter
from tuner.peft.lora import LoRA
from tuner.quantization.nf4 import NF4
from tuner.results import save_model
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.tiny import write_tiny_tokenizer

FP32_LOGITS = 1e-4  # as for the models alone
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 9},
    "gemma": {"head_dim": 14, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 14, "sliding_window": 9, "tie_word_embeddings": True},
    "phi3": {"num_key_value_heads": 3},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 14},
}
METHODS: dict[str, dict[str, Any]] = {
    "all linears": {},
    "rslora on q and v": {
        "use_rslora": True,
        "lora_rank": 6,
        "lora_attn_modules": ["q_proj", "v_proj"],
        "apply_lora_to_mlp": False,
    },
    "k alone": {"lora_attn_modules": ["k_proj"], "apply_lora_to_mlp": False},
    "output projection and mlp": {"lora_attn_modules": ["output_proj"]},
}
families = pytest.mark.parametrize("family", FAMILIES)
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
TOKENS = torch.randint(0, 131, (3, 30), generator=torch.Generator().manual_seed(0))

Folder = Callable[..., Path]
Reference = Callable[..., Any]


def lora(**changed: Any) -> LoRA:
    attention = ["q_proj", "k_proj", "v_proj", "output_proj"]
    keys = {"name": "lora", "lora_rank": 4, "lora_alpha": 10, "lora_dropout": 0.0, "lora_attn_modules": attention}
    flags = {"apply_lora_to_mlp": True, "apply_lora_to_output": False, "use_rslora": False}
    return LoRA(**{**keys, **flags, **changed})


def randomize(model: nn.Module, end: str) -> None:
    """As after some training."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if end in name:
            nn.init.normal_(parameter, std=0.1)


def adapted(folder: Path, method: dict[str, Any], *, nf4: bool = False) -> Decoder:
    model = tuner.load_model(folder, dtype=torch.float32)
    assert isinstance(model, Decoder)
    if nf4:
        NF4(block_size=64, double_quant=True).quantize(model)
    torch.manual_seed(11)
    lora(**method).adapt(model)
    randomize(model, ".B")
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out = model(TOKENS)
    return out if isinstance(out, Tensor) else out.logits


def with_peft(base: Any, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter).eval()


@pytest.mark.slow
@families
@methods
def test_our_adapter_loads_in_peft_and_back_here(
    family: str, method: dict[str, Any], family_folder: Folder, reference: Reference, tmp_path: Path
) -> None:
    folder = family_folder(family, **SHAPES.get(family, {}))
    ours = adapted(folder, method)
    save_adapter(ours, tmp_path, base=str(folder), extra={})
    base = reference(folder)
    without = logits(base)
    theirs = with_peft(base, tmp_path)
    assert (logits(theirs) - without).abs().max() > 0.05  # the adapter says something
    assert (logits(theirs) - logits(ours)).abs().max() <= FP32_LOGITS
    held = [name for name, _ in theirs.named_parameters() if "lora_" in name]
    assert len(held) == len(load_file(tmp_path / "adapter_model.safetensors"))
    again = tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path)
    assert (logits(again) - logits(ours)).abs().max() <= 1e-5
    before, after = dict(adapted_layers(ours)), dict(adapted_layers(again))
    assert before.keys() == after.keys()
    for path, layer in before.items():  # what was fused is apart again, with its own rank and the same numbers
        mine, theirs_ = layer.adapters["default"], after[path].adapters["default"]
        assert torch.equal(mine.A, theirs_.A), path
        assert torch.equal(mine.B, theirs_.B), path
        assert mine.scale == pytest.approx(theirs_.scale, rel=1e-12)


@pytest.mark.slow
@families
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_loads_here(
    family: str, rslora: bool, family_folder: Folder, reference: Reference, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    folder = family_folder(family, **SHAPES.get(family, {}))
    fused = family == "phi3"
    targets = ["qkv_proj", "gate_up_proj"] if fused else ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=10,
        use_rslora=rslora,
        target_modules=[*targets, "o_proj", "down_proj"],
        rank_pattern={targets[0]: 5, "layers.1.mlp.down_proj": 2},
        modules_to_save=["norm"] if family == "llama" else None,
    )
    torch.manual_seed(3)
    theirs = get_peft_model(reference(folder), config).eval()
    randomize(theirs, "lora_B")
    theirs.save_pretrained(tmp_path)
    ours = tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path)
    expected = logits(theirs)
    assert (logits(ours) - expected).abs().max() <= FP32_LOGITS
    save_adapter(ours, tmp_path / "again", base=str(folder), extra={})
    assert (logits(with_peft(reference(folder), tmp_path / "again")) - expected).abs().max() <= FP32_LOGITS
    assert isinstance(ours, Decoder)
    write_tiny_tokenizer(tmp_path / "tokenizer")
    save_model(ours, load_tokenizer(tmp_path / "tokenizer"), tmp_path / "merged")
    assert (logits(reference(tmp_path / "merged")) - expected).abs().max() <= FP32_LOGITS


@families
def test_a_fresh_adapter_is_the_identity_there_too(
    family: str, family_folder: Folder, reference: Reference, tmp_path: Path
) -> None:
    folder = family_folder(family, **SHAPES.get(family, {}))
    ours = tuner.load_model(folder, dtype=torch.float32)
    lora().adapt(ours)
    save_adapter(ours, tmp_path, base=str(folder), extra={})
    base = reference(folder)
    expected = logits(base)
    assert (logits(with_peft(base, tmp_path)) - expected).abs().max() == 0.0
    again = tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path)
    assert (logits(again) - expected).abs().max() <= FP32_LOGITS


@families
def test_over_nf4_it_is_one_of_the_dense_weights_it_saw(
    family: str, family_folder: Folder, reference: Reference, tmp_path: Path
) -> None:
    folder = family_folder(family, **SHAPES.get(family, {}))
    ours = adapted(folder, {}, nf4=True)
    save_adapter(ours, tmp_path / "adapter", base=str(folder), extra={})
    dense = tuner.load_model(folder, dtype=torch.float32)
    assert isinstance(dense, Decoder)
    NF4(block_size=64, double_quant=True).quantize(dense)
    write_tiny_tokenizer(tmp_path / "tokenizer")
    save_model(dense, load_tokenizer(tmp_path / "tokenizer"), tmp_path / "dense")
    theirs = with_peft(reference(tmp_path / "dense"), tmp_path / "adapter")
    assert (logits(theirs) - logits(ours)).abs().max() <= FP32_LOGITS


def test_the_exported_adapter_of_fused_layers_is_block_diagonal(family_folder: Folder, tmp_path: Path) -> None:
    """Rank 4 on q and v: rank 8 on qkv with no rows for k; the scale alpha / R is kept."""
    folder = family_folder("phi3", **SHAPES["phi3"])
    ours = adapted(folder, {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": False})
    save_adapter(ours, tmp_path, base=str(folder), extra={})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 20, ["qkv_proj"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_{}.weight"
    A, B = tensors[name.format("A")], tensors[name.format("B")]
    layers = dict(adapted_layers(ours))
    q, v = (layers[f"model.layers.0.self_attn.{one}_proj"].adapters["default"] for one in "qv")
    queries, keys = q.B.shape[0], 3 * 8
    assert torch.equal(A, torch.cat([q.A, v.A]))
    assert torch.equal(B[:queries, :4], q.B)
    assert torch.equal(B[queries + keys :, 4:], v.B)
    assert B.count_nonzero() == q.B.count_nonzero() + v.B.count_nonzero()


def test_modules_saved_by_a_fused_name_are_refused_by_name(
    family_folder: Folder, reference: Reference, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    folder = family_folder("phi3", **SHAPES["phi3"])
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["o_proj"], modules_to_save=["qkv_proj"])
    get_peft_model(reference(folder), config).save_pretrained(tmp_path)
    with pytest.raises(tuner.errors.ModelError, match=r"layers.0.self_attn.qkv_proj.weight is of no module"):  # type: ignore[attr-defined]
        tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path)
