"""`+scale=tiny` makes a model small and leaves it the kind of model it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from tuner.build import load_base
from tuner.config import check, compose
from tuner.config.scaling import shrunk
from tuner.errors import ConfigError
from tuner.verbs.ls import options
from tuner.vocabulary import tokenizer_of

MODELS = sorted(options()["model"])
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
SIZES |= {"num_key_value_heads", "max_position_embeddings", "head_dim", "sliding_window", "query_pre_attn_scalar"}
WORKED_OUT = {"rope_scaling", "layer_types", "max_window_layers"}


def keys(*words: str, **where: Any) -> dict[str, Any]:
    return dict(compose(list(words), **where).model)


def grouping(model: dict[str, Any]) -> str:
    heads, shared = model["num_attention_heads"], model["num_key_value_heads"]
    return "one" if shared == 1 else "all" if shared == heads else "grouped"


def test_every_model_was_found() -> None:
    assert len(MODELS) >= 26


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_structure_stays(name: str) -> None:
    composed = compose([f"model={name}", "+scale=tiny"])
    check(composed)
    whole, small = keys(f"model={name}"), dict(composed.model)
    assert small.keys() == whole.keys()
    assert small["random_weights"] is True
    assert small["package"] is None
    kept = whole.keys() - SIZES - WORKED_OUT - {"random_weights", "package"}
    assert {key: small[key] for key in kept} == {key: whole[key] for key in kept}
    assert {key for key in whole if whole[key] is None} - {"package"} == {
        key for key in small if small[key] is None
    } - {"package"}
    assert grouping(small) == grouping(whole)
    if small.get("sliding_window"):
        assert small["sliding_window"] < small["max_position_embeddings"]
    if small["head_dim"]:
        assert small["head_dim"] * small["num_attention_heads"] != small["hidden_size"]
    if "max_window_layers" in whole:
        assert whole["max_window_layers"] == whole["num_hidden_layers"]
        assert small["max_window_layers"] == small["num_hidden_layers"]
    if whole["rope_scaling"]:
        assert {**small["rope_scaling"], "original_max_position_embeddings": 0} == {
            **whole["rope_scaling"],
            "original_max_position_embeddings": 0,
        }
        assert 0 < small["rope_scaling"]["original_max_position_embeddings"] < small["max_position_embeddings"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_it_has_a_few_weights_and_a_tokenizer_that_fits_them(name: str) -> None:
    config = instantiate(compose([f"model={name}", "+scale=tiny"]).model)
    tokenizer = tokenizer_of(config)
    assert tokenizer.vocab_size == (343 if name == "tiny" else config.vocab_size)
    model = load_base(config, torch.float32, torch.device("cpu"), seed=0)
    assert 2_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 5_000_000
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Grüße, 世界"}], add_generation_prompt=True)
    assert model(torch.tensor([ids])).shape == (1, len(ids), config.vocab_size)


LONGROPE = """defaults: [phi3_mini, _self_]
max_position_embeddings: 131072
sliding_window: 262144
rope_scaling:
  {rope_type: longrope, factor: 32.0, original_max_position_embeddings: 4096, short_factor: %s, long_factor: %s}
"""
LAYERS = """defaults: [gemma2_2b, _self_]
layer_types: [%s]
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A folder of groups with models of a person's own, and a scale."""
    (tmp_path / "model").mkdir()
    (tmp_path / "scale").mkdir()
    factors = [[start + step / 100 for step in range(48)] for start in (1.0, 2.0)]
    (tmp_path / "model" / "phi3_128k.yaml").write_text(LONGROPE % tuple(factors))
    layers = ["full_attention", "full_attention", "sliding_attention"] * 9
    (tmp_path / "model" / "layers.yaml").write_text(LAYERS % ", ".join(layers[:26]))
    (tmp_path / "scale" / "small.yaml").write_text("# @package _global_\nmodel: {num_hidden_layers: 6}\n")
    (tmp_path / "scale" / "typo.yaml").write_text("# @package _global_\nmodel: {num_layers: 6}\n")
    return str(tmp_path)


def test_longrope_has_a_factor_for_each_pair_of_dimensions(own: str) -> None:
    whole = keys("model=phi3_128k", config_dir=own)["rope_scaling"]
    small = keys("model=phi3_128k", "+scale=tiny", config_dir=own)
    scaling = small["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"], scaling["original_max_position_embeddings"]) == (
        "longrope",
        32,
        64,
    )
    for name in ("short_factor", "long_factor"):
        assert len(scaling[name]) == small["hidden_size"] // small["num_attention_heads"] // 2
        assert list(scaling[name]) == whole[name][::3]
    config = instantiate(compose(["model=phi3_128k", "+scale=tiny"], config_dir=own).model)
    model = load_base(config, torch.float32, torch.device("cpu"), seed=0)
    assert model(torch.zeros(1, 80, dtype=torch.long)).isfinite().all(), "beyond the first context"


def test_every_type_of_layer_stays(own: str) -> None:
    small = keys("model=layers", "+scale=tiny", config_dir=own)
    assert list(small["layer_types"]) == ["full_attention", "sliding_attention"] * 2


def test_layers_that_slide_begin_at_the_same_share() -> None:
    whole = {**keys("model=qwen2_7b"), "max_window_layers": 14, "use_sliding_window": True}
    assert shrunk(whole, {"num_hidden_layers": 2})["max_window_layers"] == 1


def test_words_have_the_last_word() -> None:
    small = keys("experiment=llama3/8B_qlora_single_device", "+scale=tiny", "model.num_hidden_layers=3")
    assert (small["num_hidden_layers"], small["hidden_size"], small["random_tokenizer"]) == (3, 256, "llama3")
    assert keys("model=llama3_8b", "+scale=tiny", "model.random_tokenizer=qwen")["random_tokenizer"] == "qwen"


def test_a_scale_of_ones_own(own: str) -> None:
    whole, small = keys("model=llama3_8b"), keys("model=llama3_8b", "+scale=small", config_dir=own)
    changed = {key for key in whole if small[key] != whole[key]}
    assert changed == {"num_hidden_layers"}
    with pytest.raises(ConfigError, match=r"model\.num_layers=6: no such key"):
        check(compose(["model=llama3_8b", "+scale=typo"], config_dir=own))


@pytest.mark.parametrize("verb", ["generate", "evaluate", "merge", "export"])
def test_a_verb_takes_it_too(verb: str) -> None:
    words = ["model=gemma_2b", "+scale=tiny"]
    assert compose(words, config_name=f"verb/{verb}").model == compose(words).model
    with pytest.raises(ConfigError, match=r"^scale=tny: no such option; did you mean tiny\?"):
        compose(["+scale=tny"], config_name=f"verb/{verb}")


def test_a_scale_without_its_plus_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^scale=tiny: chosen with a plus, as \+scale=tiny$"):
        compose(["scale=tiny"])
