"""Adapters against Hugging Face PEFT: ours load there, theirs here, both train alike; merged they are plain models."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tuner
from tests.merging import plain_model
from tuner.build import cast_trainable
from tuner.errors import ModelError
from tuner.loop import backward
from tuner.models.decoder import Decoder
from tuner.peft.adapter import FromAdapter
from tuner.peft.adapter_folder import load_adapter
from tuner.peft.adapter_writing import save_adapter
from tuner.peft.lora import LoRA
from tuner.peft.lora_linear import LoRALinear
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


def adapted(folder: Path, *, random_b: bool = True, nf4: bool = False, **changed: Any) -> Decoder:
    """A model with an adapter whose B is as after some training, unless it is to be fresh."""
    model = tuner.load_model(folder, dtype=torch.float32)
    assert isinstance(model, Decoder)
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


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT_METHODS: dict[str, dict[str, Any]] = {
    "rank pattern": {"rank_pattern": {"q_proj": 2, "model.layers.1.mlp.up_proj": 9, r"layers\.2\.mlp\..*": 3}},
    "alpha pattern": {"alpha_pattern": {r".*\.self_attn\..*": 32, "down_proj": 1}},
    "rslora, both patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 16, "layers.0.mlp.gate_proj": 1},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 20},
    },
    "some layers": {"layers_to_transform": [0, 2]},
    "a regular expression": {"target_modules": r".*\.[12]\..*(q_proj|down_proj)"},
    "norms saved": {"modules_to_save": ["norm"]},
    "last norm saved": {"modules_to_save": ["model.norm"]},
    "linear saved": {"modules_to_save": ["down_proj", "model.layers.0.self_attn.q_proj"]},
    "mlp saved": {"modules_to_save": ["mlp"], "target_modules": ["q_proj", "v_proj"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "both saved as one": {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "head saved as one": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "embedding saved, head adapted": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "lm_head"]},
    "head adapted": {"target_modules": ["v_proj", "lm_head"]},
    "everything": {
        "modules_to_save": ["lm_head", "embed_tokens", "norm"],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 7, "0.mlp.down_proj": 3},
        "alpha_pattern": {"v_proj": 3},
    },
}


def made_by_peft(base: Any, folder: Path, *, r: int = 4, **settings: Any) -> Any:
    """An adapter as after some training, saved by PEFT itself, and PEFT's model of it."""
    from peft import LoraConfig, get_peft_model

    keys = {"r": r, "lora_alpha": 10, "lora_dropout": 0.2, "target_modules": ALL, **settings}
    torch.manual_seed(3)
    theirs = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **keys)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("settings", PEFT_METHODS.values(), ids=PEFT_METHODS)
def test_what_peft_saved_is_here_and_back_what_it_is_there(
    settings: dict[str, Any], tied: bool, llama_folder: Folder, reference: Reference, padded: Padded, tmp_path: Path
) -> None:
    """Loaded, saved again and merged: the same logits in PEFT and in transformers."""
    folder = llama_folder(tie_word_embeddings=tied)
    expected = logits(made_by_peft(reference(folder), tmp_path / "theirs", **settings), padded(131)[0].tokens)
    tokens = padded(131)[0].tokens
    assert (logits(reference(folder), tokens) - expected).abs().max() > 0.1
    ours = tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path / "theirs")
    assert isinstance(ours, Decoder)
    assert not any(module.training for module in ours.modules())
    assert (logits(ours, tokens) - expected).abs().max() <= FP32_LOGITS

    save_adapter(ours, tmp_path / "again", base=str(folder), extra={})
    theirs_saved, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    assert again.keys() == {name for name in theirs_saved if "base_layer" not in name}
    assert all(torch.equal(theirs_saved[name], tensor) for name, tensor in again.items())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        back = with_peft(reference(folder), tmp_path / "again")
    assert not [w for w in caught if "missing" in str(w.message) or "did not match" in str(w.message)]
    assert (logits(back, tokens) - expected).abs().max() <= FP32_LOGITS
    assert sum("lora_" in name for name, _ in back.named_parameters()) == sum("lora_" in name for name in again)

    write_tiny_tokenizer(tmp_path / "tokenizer")
    save_model(ours, load_tokenizer(tmp_path / "tokenizer"), tmp_path / "merged")
    merged = reference(tmp_path / "merged")
    assert (logits(merged, tokens) - expected).abs().max() <= FP32_LOGITS
    touched = {"lm_head", "embed_tokens"} & {*settings.get("modules_to_save", []), *settings.get("target_modules", [])}
    one = tied and (not touched or settings.get("ensure_weight_tying", False))
    assert merged.config.tie_word_embeddings is one
    plain = plain_model(ours, torch.float32)
    assert logits(tuner.load_model(tmp_path / "merged", dtype=torch.float32), tokens).equal(logits(plain, tokens))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*")
@pytest.mark.parametrize("family", ["mistral", "gemma", "gemma2", "qwen2", "qwen3"])
def test_what_peft_saved_of_other_families(
    family: str, family_folder: Folder, reference: Reference, padded: Padded, tmp_path: Path
) -> None:
    """Norms centred on zero, norms of queries and keys, scaled embeddings, biases, a capped head that is untied."""
    folder = family_folder(family, tie_word_embeddings=True)
    settings = {**PEFT_METHODS["everything"], "modules_to_save": ["lm_head", "norm", "v_proj"], "alpha_pattern": {}}
    tokens = padded(131)[0].tokens
    expected = logits(made_by_peft(reference(folder), tmp_path / "theirs", **settings), tokens)
    ours = tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path / "theirs")
    assert isinstance(ours, Decoder)
    assert (logits(ours, tokens) - expected).abs().max() <= FP32_LOGITS
    save_adapter(ours, tmp_path / "again", base=str(folder), extra={})
    assert (logits(with_peft(reference(folder), tmp_path / "again"), tokens) - expected).abs().max() <= FP32_LOGITS
    write_tiny_tokenizer(tmp_path / "tokenizer")
    save_model(ours, load_tokenizer(tmp_path / "tokenizer"), tmp_path / "merged")
    assert (logits(reference(tmp_path / "merged"), tokens) - expected).abs().max() <= FP32_LOGITS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*")
@pytest.mark.parametrize("name", ["linear saved", "embedding saved", "everything"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_peft_saved_over_nf4(
    name: str, tied: bool, llama_folder: Folder, reference: Reference, padded: Padded, tmp_path: Path
) -> None:
    """The same as over the dequantized weights in PEFT; a layer saved whole is not quantized."""
    folder = llama_folder(tie_word_embeddings=tied)
    made_by_peft(reference(folder), tmp_path / "theirs", **PEFT_METHODS[name])
    quantized = tuner.load_model(folder, dtype=torch.float32)
    NF4(block_size=64, double_quant=True).quantize(quantized)
    dense = reference(folder)
    plain = tuner.load_model(folder, dtype=torch.float32)
    NF4(block_size=64, double_quant=True).quantize(plain)
    plain = plain_model(plain, torch.float32)
    dense.load_state_dict(plain.state_dict())
    load_adapter(quantized, tmp_path / "theirs")
    tokens = padded(131)[0].tokens
    expected = logits(with_peft(dense, tmp_path / "theirs"), tokens)
    assert (logits(quantized, tokens) - expected).abs().max() <= FP32_LOGITS
    assert isinstance(quantized, Decoder)
    assert type(quantized.model.layers[1].mlp.down_proj) is (nn.Linear if name == "linear saved" else LoRALinear)


def test_a_head_whose_frozen_weight_peft_changed_is_kept(
    llama_folder: Folder, reference: Reference, padded: Padded, tmp_path: Path
) -> None:
    folder = llama_folder()
    base = reference(folder)
    with torch.no_grad():
        base.lm_head.weight.add_(0.1)
    expected = logits(made_by_peft(base, tmp_path / "theirs", target_modules=["lm_head"]), padded(131)[0].tokens)
    ours = tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path / "theirs")
    save_adapter(ours, tmp_path / "again", base=str(folder), extra={})
    for name in ("theirs", "again"):
        tokens = padded(131)[0].tokens
        found = tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path / name)
        assert (logits(found, tokens) - expected).abs().max() <= FP32_LOGITS
        assert (logits(with_peft(reference(folder), tmp_path / name), tokens) - expected).abs().max() <= FP32_LOGITS


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], None], tuple[str, ...]]] = {
    "a layer that is not there": (
        lambda t: t.update({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 48)}),
        ("model.layers.7.mlp.up_proj is no linear layer of it",),
    ),
    "half an adapter": (
        lambda t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"),
        ("model.layers.0.self_attn.q_proj has one of lora_A and lora_B only",),
    ),
    "another size": (
        lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 50)}),
        ("model.layers.0.self_attn.q_proj is made for another size than [48, 48]",),
    ),
    "another rank": (
        lambda t: t.update(
            {
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(5, 48),
                "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(48, 5),
            }
        ),
        ("model.layers.0.self_attn.q_proj has rank 5 where adapter_config.json says 4",),
    ),
    "a saved module missing, another of another size, one too many": (
        lambda t: (
            t.pop("base_model.model.model.norm.weight"),
            t.update({"base_model.model.lm_head.weight": torch.ones(130, 48)}),
            t.update({"base_model.model.model.embed_tokens.weight": torch.ones(131, 48)}),
        ),
        (
            "model.norm.weight is missing, which modules_to_save names",
            "lm_head.weight is [130, 48] and should be [131, 48]",
            "model.embed_tokens.weight is of no module it could replace",
        ),
    ),
    "a layer that target_modules leaves out": (
        lambda t: t.update(
            {
                "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": torch.ones(4, 48),
                "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight": torch.ones(24, 4),
            }
        ),
        ("model.layers.0.self_attn.k_proj has an adapter, which adapter_config.json leaves out (target_modules, ",),
    ),
    "an adapted embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 131)}),
        ("model.embed_tokens.lora_embedding_A is of no module it could replace",),
    ),
    "nothing": (lambda t: t.clear(), ("no layer has an adapter in it", "lm_head.weight is missing")),
}


@pytest.mark.parametrize(("damage", "parts"), DAMAGE.values(), ids=DAMAGE)
def test_tensors_that_do_not_fit_are_all_named_and_nothing_changes(
    damage: Callable[[dict[str, Tensor]], None],
    parts: tuple[str, ...],
    llama_folder: Folder,
    reference: Reference,
    tmp_path: Path,
) -> None:
    folder = llama_folder(tie_word_embeddings=True)
    made_by_peft(reference(folder), tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    model = tuner.load_model(folder, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match="does not fit the model") as raised:
        load_adapter(model, tmp_path)
    assert "\n" not in str(raised.value)
    assert all(part in str(raised.value) for part in parts), raised.value
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_matrices_that_should_be_one_and_differ_are_refused(
    llama_folder: Folder, reference: Reference, tmp_path: Path
) -> None:
    folder = llama_folder(tie_word_embeddings=True)
    made_by_peft(reference(folder), tmp_path, **PEFT_METHODS["both saved as one"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"lm_head and model\.embed_tokens differ, which ensure_weight_tying"):
        tuner.load_model(folder, dtype=torch.float32, adapter=tmp_path)


CONTINUED = ["rslora, both patterns", "linear saved", "both saved", "both saved as one", "everything"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*")
@pytest.mark.parametrize("name", CONTINUED)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_training_what_peft_saved_equals_peft(
    name: str, tied: bool, llama_folder: Folder, reference: Reference, padded: Padded, tmp_path: Path
) -> None:
    """Three steps from a loaded adapter: the same parameters train, and come to the same."""
    folder = llama_folder(tie_word_embeddings=tied)
    made_by_peft(reference(folder), tmp_path / "start", lora_dropout=0.0, **PEFT_METHODS[name])
    theirs = with_peft(reference(folder), tmp_path / "start", trained=True).train()
    ours = tuner.load_model(folder, dtype=torch.float32)
    FromAdapter("adapter", str(tmp_path / "start")).adapt(ours)
    cast_trainable(ours, Precision("fp32", "float32", "auto"))
    ours.train()
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert counts[0] == counts[1]
    # As below, and larger: an embedding's row may have a gradient from a single token, near 1e-4 itself.
    mine, other = (
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, eps=1e-3)
        for model in (ours, theirs)
    )
    for step in range(3):
        batch, mask = padded(131, seed=step)
        loss = backward(ours, [batch])
        mine.step()
        mine.zero_grad()
        expected = theirs(batch.tokens, attention_mask=mask.long(), labels=batch.labels).loss
        expected.backward()
        other.step()
        other.zero_grad()
        assert loss == pytest.approx(expected.item(), abs=1e-5)
    save_adapter(ours, tmp_path / "ours", base=str(folder), extra={})
    theirs.save_pretrained(tmp_path / "theirs")
    found, wanted, start = (
        load_file(tmp_path / where / "adapter_model.safetensors") for where in ("ours", "theirs", "start")
    )
    assert found.keys() == wanted.keys()
    assert all((found[key] - tensor).abs().max() <= 2e-5 for key, tensor in wanted.items())
    assert all(not torch.equal(found[key], tensor) for key, tensor in start.items())


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
    plain = plain_model(ours, torch.float32)
    assert not any(isinstance(slot.module, LoRALinear) for slot in plain.linears())
    assert (logits(plain, tokens) - before).abs().max() <= FP32_LOGITS
    write_tiny_tokenizer(tmp_path / "tokenizer")
    save_model(ours, load_tokenizer(tmp_path / "tokenizer"), tmp_path / "merged")
    theirs = reference(tmp_path / "merged")
    assert (logits(theirs, tokens) - before).abs().max() <= FP32_LOGITS
    assert torch.equal(logits(ours, tokens), before)  # the model itself has its adapter as before
    assert theirs.config.tie_word_embeddings is shape["tie_word_embeddings"]
    original = (logits(reference(folder), tokens) - before).abs().max()
    assert original > 0.1


def test_our_merge_is_pefts(llama_folder: Folder, reference: Reference, tmp_path: Path) -> None:
    folder = llama_folder()
    ours = adapted(folder, apply_lora_to_output=True)
    save_adapter(ours, tmp_path, base=str(folder), extra={})
    ours = plain_model(ours, torch.float32)
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
    quantized = plain_model(quantized, torch.float32)
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
