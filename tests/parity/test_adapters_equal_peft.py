"""Adapters against Hugging Face PEFT: ours load there, theirs here, both train alike; merged they are plain models."""

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
from tuner.build import cast_trainable
from tuner.loop import backward
from tuner.models.llama import Llama
from tuner.peft.adapter_folder import load_adapter, save_adapter
from tuner.peft.lora import LoRA
from tuner.peft.lora_linear import LoRALinear
from tuner.peft.merge import merge_adapters
from tuner.quantization.nf4 import NF4
from tuner.results import save_model
from tuner.tokenizers import load_tokenizer
from tuner.tokenizers.tiny import write_tiny_tokenizer
from tuner.types import Batch, Precision

FP32_LOGITS = 1e-4  # of logits up to 20: sums in another order, a few dozen ulp of 2e-6

ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "all linears": {},
    "q and v": {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": False},
    "mlp": {"lora_attn_modules": []},
    "rslora": {"use_rslora": True, "lora_rank": 6},
}
METHODS_OF_FOLDERS = [
    pytest.param(
        shape,
        method,
        id=f"{'tied' if shape['tie_word_embeddings'] else 'untied'}, {name}",
    )
    for shape in ({"tie_word_embeddings": True, "attention_bias": True}, {"tie_word_embeddings": False})
    for name, method in METHODS.items()
] + [pytest.param({"tie_word_embeddings": False}, {"apply_lora_to_output": True}, id="untied, output too")]

Folder = Callable[..., Path]
Reference = Callable[..., Any]
Padded = Callable[..., tuple[Batch, Tensor]]


def lora(**changed: Any) -> LoRA:
    keys = {
        "name": "lora",
        "lora_rank": 4,
        "lora_alpha": 10,
        "lora_dropout": 0.0,
        "lora_attn_modules": ATTENTION,
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": False,
        "use_rslora": False,
    }
    return LoRA(**{**keys, **changed})


def adapted(folder: Path, *, random_b: bool = True, nf4: bool = False, **changed: Any) -> Llama:
    """A model with an adapter whose B is as after some training, unless it is to be fresh."""
    model = tuner.load_model(folder, dtype=torch.float32)
    assert isinstance(model, Llama)
    if nf4:
        NF4(block_size=64, double_quant=True).quantize(model)
    torch.manual_seed(11)
    lora(**changed).adapt(model)
    for name, parameter in model.named_parameters():
        if random_b and name.endswith(".B"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def with_peft(base: Any, adapter: Path, *, trained: bool = False) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter, is_trainable=trained).eval()


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize(("shape", "method"), METHODS_OF_FOLDERS)
def test_our_adapter_loads_in_peft(
    shape: dict[str, Any],
    method: dict[str, Any],
    llama_folder: Folder,
    reference: Reference,
    padded: Padded,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    folder = llama_folder(**shape)
    ours = adapted(folder, **method)
    save_adapter(ours, tmp_path, base=str(folder), extra={"quantization": "none"})
    tokens = padded(131)[0].tokens
    base = reference(folder)
    without = logits(base, tokens)
    theirs = with_peft(base, tmp_path)
    assert not [w for w in recwarn if "adapter" in str(w.message) or "missing" in str(w.message)]
    expected = logits(theirs, tokens)
    assert (expected - without).abs().max() > 0.1  # the adapter says something
    assert (logits(ours, tokens) - expected).abs().max() <= FP32_LOGITS
    held = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    assert len(held) == len(load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize(("shape", "method"), METHODS_OF_FOLDERS)
def test_an_adapter_of_peft_loads_here(
    shape: dict[str, Any],
    method: dict[str, Any],
    llama_folder: Folder,
    reference: Reference,
    padded: Padded,
    tmp_path: Path,
) -> None:
    from peft import LoraConfig, get_peft_model

    folder = llama_folder(**shape)
    keys = lora(**method)
    names = {"output_proj": ["o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"], "output": ["lm_head"]}
    targets = [name for role in keys.roles for name in names.get(role, [role])]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=keys.rank,
        lora_alpha=10,
        lora_dropout=0.3,
        use_rslora=keys.use_rslora,
        target_modules=targets,
    )
    torch.manual_seed(3)
    theirs = get_peft_model(reference(folder), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path)
    assert not ours.training
    assert not any(module.training for module in ours.modules())
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    tokens = padded(131)[0].tokens
    assert (logits(ours, tokens) - logits(theirs, tokens)).abs().max() <= FP32_LOGITS
    # And back: what we save of it is what they saved.
    save_adapter(ours, tmp_path / "again", base=str(folder), extra={})
    # (PEFT adds the frozen weight of an adapted head, which we read but do not repeat.)
    theirs_saved, again = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "again"))
    assert again.keys() == {name for name in theirs_saved if "base_layer" not in name}
    assert all(torch.equal(theirs_saved[name], tensor) for name, tensor in again.items())
    written, read = (json.loads((p / "adapter_config.json").read_text()) for p in (tmp_path / "again", tmp_path))
    assert {key: read[key] for key in written if key != "target_modules"} == {
        key: value for key, value in written.items() if key != "target_modules"
    }
    assert set(written["target_modules"]) == set(read["target_modules"])


@pytest.mark.parametrize("tied", [True, False])
def test_five_steps_of_training_equal_peft(
    tied: bool, llama_folder: Folder, reference: Reference, padded: Padded, tmp_path: Path
) -> None:
    folder = llama_folder(tie_word_embeddings=tied)
    method = {} if tied else {"apply_lora_to_output": True}
    ours = adapted(folder, random_b=False, **method)
    cast_trainable(ours, Precision("fp32", "float32", "auto"))
    save_adapter(ours, tmp_path, base=str(folder), extra={})
    theirs = with_peft(reference(folder), tmp_path, trained=True).train()
    ours.train()
    # Adam divides by the gradient's size, so an eps far below the gradients would turn rounding noise into whole steps.
    mine, other = (
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, eps=1e-4)
        for model in (ours, theirs)
    )
    for step in range(5):
        batch, mask = padded(131, seed=step)
        loss = backward(ours, [batch])
        mine.step()
        mine.zero_grad()
        expected = theirs(batch.tokens, attention_mask=mask.long(), labels=batch.labels).loss
        expected.backward()
        other.step()
        other.zero_grad()
        assert loss == pytest.approx(expected.item(), abs=1e-5)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    layers = [slot for slot in ours.linears() if isinstance(slot.module, LoRALinear)]
    assert len(trained) == 2 * len(layers) == sum(p.requires_grad for p in ours.parameters())
    for slot in layers:
        adapter = slot.module.adapters["default"]
        for part in ("A", "B"):
            theirs_now = trained[f"base_model.model.{slot.path}.lora_{part}.default.weight"]
            assert (getattr(adapter, part) - theirs_now).abs().max() <= 1e-5, (slot.path, part)
        assert adapter.B.abs().max() > 1e-2  # it moved


@pytest.mark.parametrize("nf4", [False, True], ids=["dense base", "nf4 base"])
@pytest.mark.parametrize(
    "shape",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "intermediate_size": 64},
    ],
    ids=["tied", "untied with biases"],
)
def test_a_merged_model_loads_in_transformers(
    shape: dict[str, Any], nf4: bool, llama_folder: Folder, reference: Reference, padded: Padded, tmp_path: Path
) -> None:
    folder = llama_folder(**shape)
    ours = adapted(folder, nf4=nf4, apply_lora_to_output=not shape["tie_word_embeddings"])
    tokens = padded(131)[0].tokens
    before = logits(ours, tokens)
    merge_adapters(ours, torch.float32)
    assert not any(isinstance(slot.module, LoRALinear) for slot in ours.linears())
    assert (logits(ours, tokens) - before).abs().max() <= FP32_LOGITS
    write_tiny_tokenizer(tmp_path / "tokenizer")
    save_model(ours, load_tokenizer(tmp_path / "tokenizer"), tmp_path / "merged")
    theirs = reference(tmp_path / "merged")
    assert (logits(theirs, tokens) - before).abs().max() <= FP32_LOGITS
    assert theirs.config.tie_word_embeddings is shape["tie_word_embeddings"]
    original = (logits(reference(folder), tokens) - before).abs().max()
    assert original > 0.1


def test_our_merge_is_pefts(llama_folder: Folder, reference: Reference, tmp_path: Path) -> None:
    folder = llama_folder()
    ours = adapted(folder, apply_lora_to_output=True)
    save_adapter(ours, tmp_path, base=str(folder), extra={})
    merge_adapters(ours, torch.float32)
    theirs = with_peft(reference(folder), tmp_path).merge_and_unload().state_dict()
    found = ours.state_dict()
    assert theirs.keys() == found.keys()
    assert all((found[name] - tensor).abs().max() <= 1e-6 for name, tensor in theirs.items())  # weights below 2


def test_an_adapter_over_nf4_is_one_of_the_dense_weights_it_saw(
    llama_folder: Folder, reference: Reference, padded: Padded, tmp_path: Path
) -> None:
    """What PEFT gives on the dequantized base is what our quantized model gave."""
    folder = llama_folder()
    ours = adapted(folder, nf4=True)
    save_adapter(ours, tmp_path, base=str(folder), extra={"quantization": "nf4"})
    base = reference(folder)
    quantized = tuner.load_model(folder, dtype=torch.float32)
    NF4(block_size=64, double_quant=True).quantize(quantized)
    merge_adapters(quantized, torch.float32)
    base.load_state_dict(quantized.state_dict())
    tokens = padded(131)[0].tokens
    assert (logits(with_peft(base, tmp_path), tokens) - logits(ours, tokens)).abs().max() <= FP32_LOGITS


def test_an_adapter_loads_over_nf4(llama_folder: Folder, padded: Padded, tmp_path: Path) -> None:
    folder = llama_folder()
    ours = adapted(folder, nf4=True)
    save_adapter(ours, tmp_path, base=str(folder), extra={"quantization": "nf4"})
    fresh = tuner.load_model(folder, dtype=torch.float32)
    NF4(block_size=64, double_quant=True).quantize(fresh)
    load_adapter(fresh, tmp_path)
    tokens = padded(131)[0].tokens
    assert torch.equal(logits(fresh, tokens), logits(ours, tokens))
