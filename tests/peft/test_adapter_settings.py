"""What an adapter_config.json may say: settings that would change the adapter are applied or refused, never ignored."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from tuner.errors import ModelError
from tuner.peft.adapter_folder import read_adapter_config


def written(folder: Path, **changes: Any) -> Path:
    config = {key: value for key, value in asdict(LoraConfig(r=4)).items() if not callable(value)}
    text = json.dumps({**config, "peft_type": "LORA", **changes}, default=str)
    (folder / "adapter_config.json").write_text(text)
    return folder


def test_every_default_of_peft_is_understood(tmp_path: Path) -> None:
    assert read_adapter_config(written(tmp_path))["r"] == 4


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("a_setting_of_tomorrow", 1),
        ("init_lora_weights", "pissa_niter_16"),
        ("bias", "all"),
        ("peft_type", "IA3"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(setting: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=setting):
        read_adapter_config(written(tmp_path, **{setting: value}))
