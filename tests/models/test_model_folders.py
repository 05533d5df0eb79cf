"""Hugging Face folders: what is read and written, and how everything that is wrong with one is named."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from torch import Tensor

import tuner
from tuner.build import load_base
from tuner.errors import CheckpointError, ModelError
from tuner.models import writing
from tuner.models.decoder import Decoder
from tuner.models.folder import INDEX, SINGLE
from tuner.models.llama import LlamaConfig
from tuner.models.stored import stored_tensors
from tuner.models.writing import save_weights
from tuner.tokenizers.tiny import write_tiny_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def random_llama(**changed: Any) -> Decoder:
    config = LlamaConfig.from_hugging_face({**SHAPE, **changed}, None)
    return load_base(config, torch.float32, torch.device("cpu"), seed=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = random_llama()
    save_weights(tmp_path / "model", model.config.to_hugging_face(), stored_tensors(model))
    return tmp_path / "model"


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        tuner.load_model(folder, dtype=torch.float32)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return tuner.load_model(folder, dtype=torch.float32)(torch.arange(20)[None])


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_loads_as_it_was(tmp_path: Path, tied: bool) -> None:
    model = random_llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True, head_dim=8)
    save_weights(tmp_path, model.config.to_hugging_face(), stored_tensors(model))
    loaded = tuner.load_model(tmp_path, dtype=torch.float32)
    assert isinstance(loaded, Decoder)
    assert loaded.tied is tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert not any(p.requires_grad for p in loaded.parameters())
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_asked_dtype_is_loaded(folder: Path) -> None:
    model = tuner.load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_tilde_is_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    with torch.no_grad():
        at_home = tuner.load_model(f"~/{folder.name}", dtype=torch.float32)(torch.arange(20)[None])
    assert torch.equal(at_home, logits(folder))
    write_tiny_tokenizer(folder)
    assert tuner.load_tokenizer(f"~/{folder.name}").vocab_size == tuner.load_tokenizer(folder).vocab_size


@pytest.mark.parametrize("theta", [10_000.0, 700.0])
def test_both_generations_of_config_mean_the_same(folder: Path, theta: float) -> None:
    def version_4(config: dict[str, Any]) -> None:
        config.pop("rope_parameters")
        config.update(rope_theta=theta, rope_scaling=None, torch_dtype="float32")
        config.pop("dtype")

    def version_5(config: dict[str, Any]) -> None:
        for key in ("rope_theta", "rope_scaling", "torch_dtype"):
            config.pop(key, None)
        config.update(rope_parameters={"rope_type": "default", "rope_theta": theta}, dtype="float32")

    default = logits(folder)
    original = (folder / "config.json").read_text()
    edit_config(folder, version_4)
    old = logits(folder)
    (folder / "config.json").write_text(original)
    edit_config(folder, version_5)
    assert torch.equal(old, logits(folder))
    assert torch.equal(old, default) is (theta == 10_000.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported; valid: "),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type='linear' lacks factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope_type='linear': factor=0 is no number > 0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "has no beta; valid: factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor, orig"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; valid: silu"),
        ({"model_type": "lama"}, "model_type=lama is not supported; did you mean llama? valid: "),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
    ],
)
def test_a_config_it_cannot_do_is_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    edit_config(folder, lambda config: config.update(change))
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "24"}, "hidden_size='24': expected a whole number > 0"),
        ({"hidden_size": 24.0}, "hidden_size=24.0: expected a whole number > 0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: expected a whole number > 0"),
        ({"vocab_size": True}, "vocab_size=True: expected a whole number > 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1: expected a number > 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false': expected true or false"),
        ({"head_dim": 5}, "head_dim=5: expected an even number"),
        ({"max_position_embeddings": None}, "max_position_embeddings=None: expected a whole number > 0"),
        ({"rope_parameters": None, "rope_theta": -1}, "rope_theta=-1: expected a number > 0"),
        ({"rope_parameters": "linear"}, "rope_scaling='linear': expected a mapping"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "expected a mapping of one scaling's settings"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "rope_scaling={'rope_type': ['linear']}: expected a mapping"),
        ({"is_causal": False}, "is_causal=False is not supported; valid: True"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "layer_types=["),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0: expected a whole number > 0 or null"),
        (
            {"model_type": "gemma2", "hidden_activation": None, "final_logit_softcapping": 0},
            "expected a number > 0 or null",
        ),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_key(folder: Path, change: dict[str, Any], said: str) -> None:
    edit_config(folder, lambda config: config.update(change))
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("header", "said"),
    [(b"[1,2]", "does not say where tensors are"), (b'{"a":{"dtype":"F32"}}', "does not say where tensors are")],
)
def test_a_header_of_another_form_is_named(folder: Path, header: bytes, said: str) -> None:
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    assert said in refusal(folder)


def test_rotary_frequencies_of_older_exports_are_skipped(folder: Path) -> None:
    """Llama 2 folders of 2023 hold this buffer, which every layer computes for itself."""
    expected = logits(folder)

    def older(tensors: dict[str, Tensor]) -> None:
        for index in range(2):
            tensors[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    edit_tensors(folder, older)
    assert torch.equal(logits(folder), expected)


def test_missing_keys_are_all_named(folder: Path) -> None:
    edit_config(folder, lambda config: [config.pop(key) for key in ("vocab_size", "hidden_size")])
    assert "lacks vocab_size, hidden_size" in refusal(folder)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "not a JSON object" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE}))
    assert f"no {SINGLE} and no {INDEX}" in refusal(tmp_path)


def test_every_tensor_that_does_not_fit_is_named(folder: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 3)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(24, 24)

    edit_tensors(folder, damage)
    said = refusal(folder)
    assert "missing model.norm.weight [24]" in said
    assert "missing model.layers.1.mlp.up_proj.weight [40, 24]" in said
    assert "unexpected model.layers.2.mlp.up_proj.weight [2, 3]" in said
    assert "unexpected model.layers.0.self_attn.q_proj.bias [24]" in said
    assert "model.layers.0.self_attn.k_proj.weight is [24, 24] and should be [12, 24]" in said


def test_layers_that_do_not_fit_alike_are_named_in_one_sentence(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(intermediate_size=41, num_hidden_layers=5))
    said = refusal(folder)
    assert "model.layers.0-1.mlp.up_proj.weight is [40, 24] and should be [41, 24]" in said
    assert "missing model.layers.2-4.mlp.up_proj.weight [41, 24]" in said
    assert said.count(";") == 3 + 9 - 1


def test_an_untied_head_that_is_missing_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "missing lm_head.weight [61, 24]" in refusal(folder)


def test_a_tied_folder_may_hold_the_head_twice_but_not_two_heads(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(tie_word_embeddings=True))
    assert "tie_word_embeddings, and lm_head.weight is another matrix" in refusal(folder)
    embedding = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    model = tuner.load_model(folder, dtype=torch.float32)
    assert isinstance(model, Decoder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_named(folder: Path, kept: int) -> None:
    whole = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(whole[:kept])
    said = refusal(folder)
    assert f"{folder / SINGLE}: truncated" in said


def test_a_file_of_another_kind_is_named(folder: Path) -> None:
    (folder / SINGLE).write_bytes((20).to_bytes(8, "little") + b"no json at all......" + bytes(80))
    assert f"{folder / SINGLE}: no safetensors file" in refusal(folder)


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Decoder, Path]:
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 20_000)
    model = random_llama(attention_bias=True)
    save_weights(tmp_path / "sharded", model.config.to_hugging_face(), stored_tensors(model))
    return model, tmp_path / "sharded"


def test_shards_are_numbered_indexed_and_small(sharded: tuple[Decoder, Path]) -> None:
    model, folder = sharded
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, 1 + len(files))
    ]
    index = json.loads((folder / INDEX).read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert all(sum(t.numel() * 4 for t in load_file(file).values()) <= 20_000 for file in files)


def test_a_missing_shard_is_named(sharded: tuple[Decoder, Path]) -> None:
    _, folder = sharded
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    said = refusal(folder)
    assert f"missing {lost.name}" in said
    assert INDEX in said


def test_a_truncated_shard_is_named(sharded: tuple[Decoder, Path]) -> None:
    _, folder = sharded
    torn = sorted(folder.glob("*.safetensors"))[1]
    torn.write_bytes(torn.read_bytes()[:-3])
    assert f"{torn}: truncated" in refusal(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_shards_load_bitwise_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 20_000)
    model = random_llama(tie_word_embeddings=tied, rope_theta=123.0, rms_norm_eps=1e-4)
    save_weights(tmp_path, model.config.to_hugging_face(), stored_tensors(model))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = model.state_dict()
    assert theirs.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.state_dict().items())
    assert theirs.config.rope_parameters["rope_theta"] == 123.0
    assert theirs.config.rms_norm_eps == 1e-4
    assert theirs.config.tie_word_embeddings is tied


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama()
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: free)
    with pytest.raises(CheckpointError, match=r"no room for the model: .* has 0 MiB free and needs 0 MiB"):
        save_weights(tmp_path / "model", model.config.to_hugging_face(), stored_tensors(model))
    assert not list((tmp_path / "model").iterdir())


def test_no_more_than_one_files_tensors_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are made when they are asked for, as from a GGUF file, never exist all at once."""
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 1000)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for index in range(40):
            tensor = torch.full((50,), float(index))  # 200 bytes
            made.append(weakref.ref(tensor))
            alive.append(sum(one() is not None for one in made))
            yield f"tensor.{index}", tensor

    writing.write_weights(tmp_path, {}, 8000, tensors())
    assert max(alive) <= 6  # five fill a file, and one waits for the next
    assert len(list(tmp_path.glob("model-*-of-00008.safetensors"))) == 8
    held = {name: float(t[0]) for file in tmp_path.glob("*.safetensors") for name, t in load_file(file).items()}
    assert held == {f"tensor.{index}": float(index) for index in range(40)}


def test_a_scaling_is_one_key_of_the_configuration() -> None:
    said = (
        "{rope_type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 64}"
    )
    cfg = tuner.compose(["model=llama", f"model.rope_scaling={said}"])
    tuner.check(cfg)
    config = instantiate(cfg.model)
    again = LlamaConfig.from_hugging_face(json.loads(json.dumps(config.to_hugging_face())), None)
    assert again.rope_scaling == config.rope_scaling == yaml.safe_load(said)


def test_a_wrong_scaling_in_the_configuration_is_named() -> None:
    cfg = tuner.compose(["model=llama", "model.rope_scaling={rope_type: yarn, factor: 2}"])
    with pytest.raises(
        InstantiationException, match=r"model.rope_scaling: rope_type='yarn' is not supported; valid: def"
    ):
        instantiate(cfg.model)


@pytest.mark.parametrize("name", ["../elsewhere/model.safetensors", "/etc/hostname", ".."])
def test_an_index_names_files_of_its_own_folder_only(sharded: tuple[Decoder, Path], name: str) -> None:
    _, folder = sharded
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    assert f"weight_map names {name!r}, which is no file of this folder" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_were_quantized_are_refused_and_not_cast(folder: Path, dtype: torch.dtype) -> None:
    def quantize(tensors: dict[str, Tensor]) -> None:
        for layer in (0, 1):
            name = f"model.layers.{layer}.mlp.up_proj.weight"
            tensors[name] = tensors[name].to(dtype)

    edit_tensors(folder, quantize)
    said = refusal(folder)
    assert all(f"model.layers.{layer}.mlp.up_proj.weight is " in said for layer in (0, 1))
    assert "valid: F64, F32, F16, BF16; was this folder quantized?" in said
