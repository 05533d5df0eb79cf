"""A configuration that names an adapter says what its folder says, without torch, here and elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuner.config import check, compose, freeze
from tuner.errors import ConfigError, IllegalCombination, UnknownKey

SHAPE = {"model_type": "llama", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({**SHAPE, "num_attention_heads": 2}))
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "my adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def facts(adapter: Path, **quantization: Any) -> None:
    text = json.dumps({"quantization": quantization, "precision": "bf16"})
    (adapter / "tuner.json").write_text(text)


@pytest.mark.usefixtures("adapter")
def test_it_brings_method_and_base(base: Path) -> None:
    cfg = compose(["adapter='my adapter'"])
    assert cfg.peft == {"_target_": "tuner.peft.adapter.FromAdapter", "name": "adapter", "path": "my adapter"}
    assert cfg.model.path == str(base)
    assert cfg.quantization._target_ == "tuner.quantization.none.NoQuantization"
    check(cfg)


@pytest.mark.usefixtures("adapter")
def test_frozen_it_means_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = freeze(compose(["adapter='my adapter'"]))
    assert (frozen.adapter, frozen.peft.path) == (f"{tmp_path}/my adapter",) * 2
    monkeypatch.chdir("/")
    assert freeze(frozen) == frozen
    check(frozen)


def test_words_have_the_last_word(adapter: Path) -> None:
    facts(adapter, name="nf4", block_size=128)
    said = compose(["adapter='my adapter'"])
    assert (said.quantization.block_size, said.quantization.double_quant) == (128, True)
    assert said.precision._target_ == "tuner.precision.bf16.bf16"
    other = compose(["adapter='my adapter'", "model=tiny", "quantization=none", "precision=fp32"])
    assert (other.model.path, other.model.random_weights) == (None, True)
    assert other.quantization._target_ == "tuner.quantization.none.NoQuantization"
    assert other.precision._target_ == "tuner.precision.fp32.fp32"


def test_what_the_folder_names_is_judged_by_no_trust(adapter: Path) -> None:
    facts(adapter, name="nf4", _target_="payload.ran")
    with pytest.raises(ConfigError, match=r"quantization\._target_=payload\.ran: not among the classes"):
        compose(["adapter='my adapter'", "trust_targets=[payload]"])
    facts(adapter, name="nf4", block_size="${seed}")
    with pytest.raises(ConfigError, match=r"quantization\.block_size=0: expected"):
        compose(["adapter='my adapter'", "seed=64"])


@pytest.mark.usefixtures("adapter")
def test_what_cannot_go_with_it() -> None:
    with pytest.raises(UnknownKey) as raised:
        compose(["adapter='my adapter'", "peft.lora_rank=2", "+peft.more=1"])
    assert raised.value.problems == [
        "peft.lora_rank=2 adapter=my adapter: the adapter brings its own; say one of the two",
        "+peft.more=1 adapter=my adapter: the adapter brings its own; say one of the two",
    ]
    for words in (["peft=full"], ["peft=lora"], ["peft=qlora"]):
        with pytest.raises(IllegalCombination, match="brings its own method"):
            check(compose(["adapter='my adapter'", *words]))
    check(compose(["adapter='my adapter'", "peft=adapter"]))
    with pytest.raises(IllegalCombination, match="needs a value, as adapter=FOLDER"):
        check(compose(["peft=adapter"]))
    cfg = compose(["adapter='my adapter'"])
    cfg.peft.path = "another"
    with pytest.raises(IllegalCombination, match=r"peft\.path=another adapter=my adapter: two adapters"):
        check(cfg)


@pytest.mark.usefixtures("adapter")
def test_it_is_read_and_checked_without_torch() -> None:
    script = "import sys, tuner; tuner.check(tuner.compose([\"adapter='my adapter'\"])); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "False\n"


@pytest.mark.usefixtures("adapter")
def test_hydras_own_switches_show_it() -> None:
    words = [sys.executable, "-m", "tuner", "--cfg", "job", "adapter='my adapter'"]
    shown = subprocess.check_output(words, text=True)
    assert "_target_: tuner.peft.adapter.FromAdapter" in shown
    assert "lora_rank" not in shown
