"""What an adapter_config.json may say: settings that would change the adapter are applied or refused, never ignored."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from tuner.adapter_config import read_adapter_config
from tuner.errors import ModelError


def written(folder: Path, **changes: Any) -> Path:
    config = {key: value for key, value in asdict(LoraConfig(r=4)).items() if not callable(value)}
    text = json.dumps({**config, "peft_type": "LORA", **changes}, default=str)
    (folder / "adapter_config.json").write_text(text)
    return folder


def test_every_default_of_peft_is_understood(tmp_path: Path) -> None:
    assert read_adapter_config(written(tmp_path)).rank == 4


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", "yes"),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("a_setting_of_tomorrow", 1),
        ("init_lora_weights", "pissa_niter_16"),
        ("bias", "all"),
        ("peft_type", "LOHA"),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["weight"]),
        ("r", 0),
        ("lora_alpha", "much"),
        ("lora_dropout", 1.5),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": "2"}),
        ("alpha_pattern", {"(q_proj": 2}),
        ("modules_to_save", "lm_head"),
        ("base_model_name_or_path", 3),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(setting: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=setting) as raised:
        read_adapter_config(written(tmp_path, **{setting: value}))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("IA3", "fan_in_fan_out", True),
        ("IA3", "feedforward_modules", [3]),
        ("IA3", "feedforward_modules", "(down"),
        ("IA3", "use_dora", True),
        ("IA3", "trainable_token_indices", [1]),
        ("LN_TUNING", "feedforward_modules", ["down_proj"]),
        ("LN_TUNING", "modules_to_save", "lm_head"),
        ("LN_TUNING", "r", 4),
    ],
)
def test_settings_of_another_kind_are_refused_by_name(kind: str, setting: str, value: Any, tmp_path: Path) -> None:
    config: dict[str, Any] = {"peft_type": kind, "target_modules": ["norm"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert read_adapter_config(tmp_path).kind == kind
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, setting: value}))
    with pytest.raises(ModelError, match=setting):
        read_adapter_config(tmp_path)


FEEDFORWARD: list[Any] = [None, ["down_proj"], ["mlp.down_proj", "o_proj"], r".*\.down_proj", r"down_proj", ["proj"]]


@pytest.mark.parametrize("feedforward", FEEDFORWARD, ids=str)
def test_feedforward_layers_are_those_of_peft(feedforward: Any, tmp_path: Path) -> None:
    from peft import IA3Config
    from peft.tuners.ia3 import IA3Model

    config = {"peft_type": "IA3", "target_modules": ".*", "feedforward_modules": feedforward}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ours = read_adapter_config(tmp_path)
    theirs = IA3Config(target_modules=".*", feedforward_modules=feedforward or [])
    for path in (f"model.layers.0.{name}" for name in ("mlp.down_proj", "self_attn.o_proj", "self_attn.k_proj")):
        assert ours.is_feedforward(path) is IA3Model._check_target_module_feedforward(theirs, path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"adapter_config\.json: not (a )?JSON"):
        read_adapter_config(tmp_path)


PATHS = [f"model.layers.{i}.{name}" for i in (0, 1, 11) for name in ("self_attn.q_proj", "mlp.gate_proj")] + ["lm_head"]
PATTERNS: list[dict[str, int]] = [
    {},
    {"q_proj": 2},
    {"proj": 2},
    {r".*_proj": 2},
    {"1.self_attn.q_proj": 2},
    {"model.layers.1.self_attn.q_proj": 2, "q_proj": 3},
    {"q_proj": 3, "model.layers.1.self_attn.q_proj": 2},
    {r"layers\.(0|1)\..*": 5, "lm_head": 6},
    {"^lm_head": 2, "base_model.model.lm_head": 3},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_mean_what_they_mean_in_peft(pattern: dict[str, int], tmp_path: Path) -> None:
    config = read_adapter_config(written(tmp_path, rank_pattern=pattern, alpha_pattern=pattern, lora_alpha=7))
    for path in PATHS:
        key = get_pattern_key(pattern.keys(), path)
        assert config.rank_of(path) == pattern.get(key, 4), path
        assert config.alpha_of(path) == pattern.get(key, 7), path


NAMES = (
    "lm_head",
    *(f"model.layers.{layer}.{end}" for layer in (0, 1, 11) for end in ("mlp.up_proj", "self_attn.q_proj")),
)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["model.layers.1.mlp.up_proj", "mlp.up_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "up_proj", "lm_head"], "layers_to_transform": 11},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": r".*layers\.1+\..*_proj"},
        {"target_modules": r"layers\.0"},
    ],
)
def test_the_layers_that_are_named_are_those_that_peft_adapts(tmp_path: Path, settings: dict[str, Any]) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = LoraConfig(**settings)
    ours = read_adapter_config(written(tmp_path, **settings))
    named = [name for name in NAMES if ours.is_target(name)]
    assert named == [name for name in NAMES if check_target_module_exists(theirs, name)]
