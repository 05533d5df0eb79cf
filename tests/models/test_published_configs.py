"""The published configuration of each named model: read, counted, named and shaped as transformers does."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate

import tuner
from tuner.build import count_parameters
from tuner.config.facts import shape_of_folder
from tuner.errors import ModelError
from tuner.models.config import NEUTRAL, ModelConfig
from tuner.models.decoder import Decoder
from tuner.models.family import FAMILIES, config_of_folder
from tuner.models.stored import stored_shapes
from tuner.verbs.ls import options

_SPEC = importlib.util.spec_from_file_location("published_configs", Path(__file__).parent / "published_configs.py")
assert _SPEC is not None and _SPEC.loader is not None  # noqa: PT018
_MODULE = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _MODULE  # its dataclass asks for it
_SPEC.loader.exec_module(_MODULE)
PUBLISHED = _MODULE.PUBLISHED

published = pytest.mark.parametrize("name", PUBLISHED)
presets = pytest.mark.parametrize("name", [name for name, model in PUBLISHED.items() if model.preset])

SAYS_NOTHING = {
    *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "pretraining_tp"),
    *("_name_or_path", "name_or_path", "return_dict", "output_hidden_states", "output_attentions", "id2label"),
    *("label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "tokenizer_class"),
    *("add_cross_attention", "cross_attention_hidden_size", "rope_parameters", "original_max_position_embeddings"),
}
"""Fields of transformers' classes that do not change what a decoder computes, or that are read with others."""


def shape_of(config: ModelConfig) -> dict[str, Any]:
    shape = {key: value for key, value in asdict(config).items() if key not in config.beside_config_json}
    return {**shape, "head_dim": config.size_of_head}


def folder_of(name: str, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name].config))
    return tmp_path


def reference_config(name: str) -> Any:
    from transformers import AutoConfig

    config = json.loads(json.dumps(PUBLISHED[name].config))
    if (config.get("rope_scaling") or {}).get("type") == "su":  # which this version of transformers stumbles over
        config["rope_scaling"]["type"] = "longrope"
    return AutoConfig.for_model(**config)


def on_meta(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return config.build()


@published
def test_counts_are_the_published_ones(name: str, tmp_path: Path) -> None:
    model = on_meta(config_of_folder(folder_of(name, tmp_path)))
    assert count_parameters(model)[0] == PUBLISHED[name].parameters


@published
def test_names_and_shapes_are_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of_folder(folder_of(name, tmp_path))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(reference_config(name))
    expected = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert theirs.config.tie_word_embeddings is config.tie_word_embeddings
    assert stored_shapes(on_meta(config)) == expected


@published
def test_both_generations_of_a_file_say_the_same(name: str, tmp_path: Path) -> None:
    """What transformers 5 writes for it, and what is written here, mean what the published file means."""
    original = config_of_folder(folder_of(name, tmp_path))
    version_5 = reference_config(name).to_dict()
    assert "rope_theta" not in version_5
    for spelling in (version_5, original.to_hugging_face()):
        plain = json.loads(json.dumps(spelling))
        again = FAMILIES[plain["model_type"]].from_hugging_face(plain, None)
        assert shape_of(again) == {**shape_of(original), **_filled_in(again, original)}


def _filled_in(again: ModelConfig, original: ModelConfig) -> dict[str, Any]:
    """transformers 5 lists the types of layers, and forgets a window that does not count."""
    if not hasattr(again, "layer_types"):
        return {}
    layers = range(again.num_hidden_layers)
    assert [again.window_of(layer) for layer in layers] == [original.window_of(layer) for layer in layers]
    return {"layer_types": again.layer_types, "sliding_window": again.sliding_window}  # type: ignore[attr-defined]


@presets
def test_a_preset_has_the_published_shape(name: str, tmp_path: Path) -> None:
    config = instantiate(tuner.compose([f"model={PUBLISHED[name].preset}"]).model)
    assert shape_of(config) == shape_of(config_of_folder(folder_of(name, tmp_path)))


def test_every_named_model_is_held_against_a_published_file() -> None:
    families = {*FAMILIES, "tiny"}
    assert {model.preset for model in PUBLISHED.values() if model.preset} == set(options()["model"]) - families


def test_every_yaml_that_names_a_family_is_read_from_folders_too() -> None:
    files = {name: yaml.safe_load(file.read_text()) for name, file in options()["model"].items()}
    named = {name: content["_target_"] for name, content in files.items() if "_target_" in content}
    assert named == {name: f"{one.__module__}.{one.__name__}" for name, one in FAMILIES.items()}


@published
def test_rules_know_what_the_model_knows(name: str, tmp_path: Path) -> None:
    """The check reads config.json without torch: tied or not, heads, sizes."""
    folder = folder_of(name, tmp_path)
    facts, config = shape_of_folder(str(folder)), config_of_folder(folder)
    assert facts["tie_word_embeddings"] is config.tie_word_embeddings
    assert facts["max_position_embeddings"] == config.max_position_embeddings
    assert (facts["head_dim"] or config.size_of_head) == config.size_of_head
    assert (facts["num_key_value_heads"] or config.num_attention_heads) == config.num_key_value_heads


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gemma_2b", "gemma_7b", "gemma2_2b", "qwen2_0_5b", "qwen2_1_5b", "qwen3_0_6b"])
def test_an_adapter_on_a_tied_head_is_refused_by_name_and_by_folder(preset: str, tmp_path: Path) -> None:
    name = next(name for name, model in PUBLISHED.items() if model.preset == preset)
    for words in ([f"model={preset}"], [f"model.path={folder_of(name, tmp_path)}"]):
        cfg = tuner.compose([*words, "peft.apply_lora_to_output=true"])
        with pytest.raises(tuner.errors.ConfigError, match="output layer is its embedding matrix"):  # type: ignore[attr-defined]
            tuner.check(cfg)
    tuner.check(tuner.compose(["model=qwen2_7b", "peft.apply_lora_to_output=true"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_the_reference_is_read_or_refused(family: str) -> None:
    """A key that transformers' class has and nothing here reads would give another model in silence."""
    from transformers import AutoConfig

    known = {field.name for field in fields(FAMILIES[family])} | SAYS_NOTHING
    judged = {*NEUTRAL, *FAMILIES[family].neutral, FAMILIES[family].activation_key}
    theirs = AutoConfig.for_model(family)
    assert {key for key in theirs.to_dict() if key not in known | judged} == set()
    for key, values in FAMILIES[family].neutral.items():
        assert getattr(theirs, key, None) in values


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_means_what_transformers_means(family: str) -> None:
    from transformers import AutoConfig

    needed = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    theirs = AutoConfig.for_model(family, **needed, **heads)
    read = FAMILIES[family].from_hugging_face({**needed, **heads}, None)
    for key in fields(read):
        written_otherwise = {"rope_theta", "rope_scaling", "head_dim", "layer_types", "sliding_window"}
        if key.name not in {*ModelConfig.beside_config_json, *written_otherwise}:
            assert getattr(read, key.name) == getattr(theirs, key.name), key.name
    assert read.rope_theta == theirs.rope_parameters["rope_theta"]
    assert read.size_of_head == (getattr(theirs, "head_dim", None) or 16)
    absent = FAMILIES[family].absent
    for key in ("num_key_value_heads", "sliding_window"):
        default = getattr(AutoConfig.for_model(family), key, None)
        if key in absent and not (key == "sliding_window" and family.startswith("qwen")):  # which says None if unused
            assert absent[key] == default


REFUSED = {
    "llama": [{"hidden_act": "gelu"}, {"attention_dropout": 0.1}, {"quantization_config": {"bits": 4}}],
    "mistral": [{"hidden_act": "relu"}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}],
    "gemma": [{"hidden_activation": "silu"}, {"use_bidirectional_attention": True}, {"hidden_act": "silu"}],
    "gemma2": [{"hidden_activation": "gelu"}, {"layer_types": ["chunked_attention"] * 2}, {"layer_types": ["x"]}],
    "phi3": [
        {"partial_rotary_factor": 0.75},
        {"resid_pdrop": 0.1},
        {"embd_pdrop": 0.1},
        {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
        {"rope_scaling": {"type": "su", "short_factor": [1.0] * 8}},
    ],
    "qwen2": [{"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}],
    "qwen3": [{"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}],
}


@pytest.mark.parametrize(
    ("family", "change"), [(family, change) for family, changes in REFUSED.items() for change in changes]
)
def test_a_value_that_would_be_ignored_is_refused_by_name(family: str, change: dict[str, Any], tmp_path: Path) -> None:
    shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
    base = {"model_type": family, **shape, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(base))
    on_meta(config_of_folder(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**base, **change}))
    with pytest.raises(ModelError) as caught:
        on_meta(config_of_folder(tmp_path))
    assert str(tmp_path) in str(caught.value)
    (key,) = change
    assert key in str(caught.value) or "rope_type" in str(caught.value)


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(ModelError, match="model_type=mixtral is not supported") as caught:
        config_of_folder(tmp_path)
    assert all(family in str(caught.value) for family in FAMILIES)
