"""GGUF files of every family, converted: the weights that were in them, and what transformers computes with those."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file

import tuner
from tuner.__main__ import dispatch
from tuner.errors import ModelError
from tuner.models.family import FAMILIES, config_of_folder
from tuner.models.gguf import convert
from tuner.models.gguf_config import ARCHITECTURES

_SPEC = importlib.util.spec_from_file_location("gguf_writer", Path(__file__).parent / "gguf_writer.py")
assert _SPEC is not None and _SPEC.loader is not None  # noqa: PT018
_MODULE = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _MODULE
_SPEC.loader.exec_module(_MODULE)
write_gguf = _MODULE.write_gguf

SHAPE = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    "vocab_size": 258,
}
"""Rows of whole blocks of 32, the unit of GGUF's quantizers, and as many of the embedding as there are tokens."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FACTORS = [1.0 + 0.25 * i for i in range(8)]
LONG_ROPE = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, head_dim apart": ("llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}}),
    "llama 3.1": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3}}),
    "llama 3.2": (
        "llama",
        {
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, **LLAMA3},
            "tie_word_embeddings": True,
        },
    ),
    "mistral, window": ("mistral", {"sliding_window": 9}),
    "gemma": ("gemma", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {"head_dim": 24, "sliding_window": 9, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    ),
    "gemma2, other caps": (
        "gemma2",
        {
            **{"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
            **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        },
    ),
    "phi3": ("phi3", {"sliding_window": None, "original_max_position_embeddings": 256}),
    "phi3, window": ("phi3", {"sliding_window": 9, "original_max_position_embeddings": 256}),
    "phi3, long rope": (
        "phi3",
        {"sliding_window": 200, "original_max_position_embeddings": 20, "rope_parameters": LONG_ROPE},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": (
        "qwen2",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen3": ("qwen3", {"head_dim": 24}),
}
KINDS = ("F32", "F16", "Q8_0", "Q4_0", "Q4_1")
OF_TRANSFORMERS = {
    "llama": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
}
"""Cases that transformers reads from a GGUF file as what they are: it knows no scaling, no Gemma, no window of Mistral,
and one size of Qwen3's heads."""

LOGITS = 1e-4  # as for folders: two orders of fp32 sums

Folder = Callable[..., Path]
Reference = Callable[..., Any]


def command(*words: str) -> Any:
    return dispatch(["convert", *words])


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_file_and_logits_are_transformers(
    case: str, family_folder: Folder, reference: Reference, tmp_path: Path
) -> None:
    family, shape = CASES[case]
    folder = family_folder(family, **{**SHAPE, **shape})
    weights = write_gguf(folder, tmp_path / "model.gguf")
    command(f"source={tmp_path}/model.gguf", f"dest={tmp_path}/converted")
    found, original = load_file(tmp_path / "converted/model.safetensors"), load_file(folder / "model.safetensors")
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(found[name], weights[name]), name
        if "norm" not in name or not family.startswith("gemma"):  # 1 added and taken away again rounds
            assert torch.equal(found[name], tensor), name
    assert config_of_folder(tmp_path / "converted").model_type == family
    tokens = torch.randint(0, 258, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(folder)(tokens).logits
        ours = tuner.load_model(tmp_path / "converted", dtype=torch.float32)(tokens)
        theirs = reference(tmp_path / "converted")(tokens).logits
    assert expected.std() > 0.3
    assert (ours - expected).abs().max() <= LOGITS
    assert (theirs - expected).abs().max() <= LOGITS


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", OF_TRANSFORMERS)
def test_quantized_files_are_what_transformers_reads(
    case: str, kind: str, family_folder: Folder, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    family, shape = CASES[case]
    folder = family_folder(family, **{**SHAPE, **shape, **OF_TRANSFORMERS[case]})
    weights = write_gguf(folder, tmp_path / "model.gguf", GGMLQuantizationType[kind])
    convert(tmp_path / "model.gguf", tmp_path / "converted")
    found = load_file(tmp_path / "converted/model.safetensors")
    original = load_file(folder / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name
        assert torch.equal(found[name], theirs[name]), name
        if tensor.ndim > 1 and kind != "F32":
            assert 0 < (tensor - original[name]).abs().max() < {"F16": 1e-3, "Q8_0": 1e-2}.get(kind, 0.2), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["gemma", "mistral, window"])
def test_quantized_files_of_the_other_families(case: str, kind: str, family_folder: Folder, tmp_path: Path) -> None:
    family, shape = CASES[case]
    folder = family_folder(family, **{**SHAPE, **shape, "head_dim": 16})
    weights = write_gguf(folder, tmp_path / "model.gguf", GGMLQuantizationType[kind])
    convert(tmp_path / "model.gguf", tmp_path / "converted")
    found = load_file(tmp_path / "converted/model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("said", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_asked_dtype_is_written(said: str, dtype: torch.dtype, family_folder: Folder, tmp_path: Path) -> None:
    weights = write_gguf(family_folder("llama", **SHAPE), tmp_path / "model.gguf", GGMLQuantizationType.Q8_0)
    command(f"source={tmp_path}/model.gguf", f"dest={tmp_path}/converted", f"dtype={said}")
    found = load_file(tmp_path / "converted/model.safetensors")
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in weights.items())
    config = json.loads((tmp_path / "converted/config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_is_that_of_the_folder(case: str, family_folder: Folder, tmp_path: Path) -> None:
    """All keys but those that a GGUF file has no place for, which then do nothing."""
    family, shape = CASES[case]
    folder = family_folder(family, **{**SHAPE, **shape})
    write_gguf(folder, tmp_path / "model.gguf")
    found = convert(tmp_path / "model.gguf", tmp_path / "converted").to_hugging_face()
    expected = config_of_folder(folder).to_hugging_face()
    if "layer_types" in expected:  # transformers lists them, the family's rule says the same
        ours, theirs = config_of_folder(tmp_path / "converted"), config_of_folder(folder)
        assert [ours.window_of(i) for i in range(3)] == [theirs.window_of(i) for i in range(3)]
    for config in (found, expected):
        for key in ("layer_types", "sliding_window", "max_window_layers"):
            config.pop(key, None)
    assert found == expected


def test_every_family_and_architecture_is_here() -> None:
    assert {family for family, _ in CASES.values()} == set(FAMILIES)
    assert {_MODULE.ARCHITECTURE.get(family, family) for family, _ in CASES.values()} == set(ARCHITECTURES)


def refusal(
    folder: Path, tmp_path: Path, edit: Callable[[GGUFWriter], None] = lambda writer: None, **given: Any
) -> str:
    write_gguf(folder, tmp_path / "model.gguf", edit=edit, **given)
    with pytest.raises(ModelError) as caught:
        command(f"source={tmp_path}/model.gguf", f"dest={tmp_path}/converted")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/model.gguf: ")
    assert "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]  # nothing half-written
    return said


REFUSED: dict[str, tuple[Callable[[GGUFWriter], None], str]] = {
    "experts": (lambda writer: writer.add_expert_count(8), "llama.expert_count=8 is not supported"),
    "yarn": (
        lambda writer: writer.add_string("llama.rope.scaling.type", "yarn"),
        "rope_type='yarn' is not supported; valid: default, linear, llama3, longrope",
    ),
    "other factors": (
        lambda writer: writer.add_tensor("rope_freqs.weight", torch.linspace(1, 8, 8).numpy()),
        "rope_freqs.weight holds factors that are not those of Llama 3.1 and later",
    ),
    "another tensor": (
        lambda writer: writer.add_tensor("blk.0.ffn_gate_exps.weight", torch.ones(2, 32).numpy()),
        "the tensors are not those that the keys describe: unexpected blk.0.ffn_gate_exps.weight [2, 32]",
    ),
    "a part": (lambda writer: writer.add_uint16("split.count", 3), "one of 3 parts; join them first with llama.cpp's"),
    "heads that differ": (
        lambda writer: writer.add_array("llama.rope.dimension_count", [8, 16]),
        "llama.rope.dimension_count has a value for each layer",
    ),
    "no heads": (
        lambda writer: writer.add_uint32("llama.attention.head_count", 0),
        "llama.attention.head_count=0 is no whole number > 0",
    ),
    "scaled logits": (lambda writer: writer.add_logit_scale(0.5), "llama.logit_scale=0.5 is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_is_refused(name: str, family_folder: Folder, tmp_path: Path) -> None:
    edit, said = REFUSED[name]
    assert said in refusal(family_folder("llama", **SHAPE), tmp_path, edit)


def test_half_a_rotary_head_is_refused(family_folder: Folder, tmp_path: Path) -> None:
    folder = family_folder("qwen2", **SHAPE)
    said = refusal(folder, tmp_path, lambda writer: writer.add_rope_dimension_count(8))
    assert "partial_rotary_factor=0.5 is not supported" in said


def test_a_missing_tensor_is_named(family_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    original = family_folder("llama", **SHAPE)
    (folder / "config.json").write_bytes((original / "config.json").read_bytes())
    tensors = load_file(original / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    write_gguf(folder, tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"missing model.layers.1.mlp.up_proj.weight \[96, 64\]"):
        convert(tmp_path / "model.gguf", tmp_path / "converted")


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "falcon")
    writer.add_tensor("token_embd.weight", torch.ones(2, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="GGUF architecture 'falcon' is not supported") as caught:
        convert(tmp_path / "model.gguf", tmp_path / "converted")
    assert all(name in str(caught.value) for name in ARCHITECTURES)


def test_a_truncated_file_is_named(family_folder: Folder, tmp_path: Path) -> None:
    """Cut anywhere: in the header, in a key, in the tokens, in the list of tensors, in their data."""
    write_gguf(family_folder("llama", **SHAPE), tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    for kept in (4, 8, 20, 30, 100, 700, 3000, 7000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.gguf").write_bytes(whole[:kept])
        with pytest.raises(ModelError, match=r"model.gguf: damaged or truncated, or no GGUF file: ") as caught:
            command(f"source={tmp_path}/model.gguf", f"dest={tmp_path}/converted")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "converted").exists()


def test_without_the_library_its_name_is_said(
    family_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(family_folder("llama", **SHAPE), tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="needs the gguf library: pip install gguf"):
        command(f"source={tmp_path}/model.gguf", f"dest={tmp_path}/converted")


def test_a_type_that_the_library_does_not_read_is_named(family_folder: Folder, tmp_path: Path) -> None:
    import numpy as np

    def edit(writer: GGUFWriter) -> None:
        info = writer.tensors[0]["blk.0.attn_q.weight"]
        info.dtype, info.tensor, info.nbytes = (
            GGMLQuantizationType.Q8_K,
            np.zeros((256, 292), dtype=np.uint8),
            256 * 292,
        )

    folder = family_folder("llama", **{**SHAPE, "hidden_size": 256})
    assert "blk.0.attn_q.weight is Q8_K: " in refusal(folder, tmp_path, edit)
