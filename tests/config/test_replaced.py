"""A group that words choose beside an experiment: what the experiment says of the member it replaces is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.config import check, compose
from tuner.errors import ConfigError

RECIPE = "experiment=llama3/8B_lora_single_device"


def test_another_method_has_its_own_keys_alone() -> None:
    assert compose([RECIPE, "peft=full"]).peft == {"_target_": "tuner.peft.full.Full", "name": "full"}
    check(compose([RECIPE, "peft=full", "schedule=constant", "optimizer=sgd"]))


def test_keys_that_both_have_keep_what_the_recipe_says() -> None:
    both = compose([RECIPE, "peft=rslora", "optimizer=adamw8bit"])
    recipe = compose([RECIPE])
    assert (both.peft.lora_rank, both.peft.lora_attn_modules) == (recipe.peft.lora_rank, recipe.peft.lora_attn_modules)
    assert both.optimizer.lr == recipe.optimizer.lr
    assert both.peft.use_rslora is True


def test_a_word_about_a_key_that_is_gone_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"peft\.lora_rank=4: no such key"):
        check(compose([RECIPE, "peft=full", "peft.lora_rank=4"]))


def test_without_an_experiment_nothing_is_left_out() -> None:
    with pytest.raises(ConfigError, match=r"peft\.lora_rank"):
        check(compose(["peft=full", "+peft.lora_rank=4"]))


def test_a_typo_of_an_experiment_stays_and_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\npeft:\n  lora_rnak: 4\n  lora_alpha: 3\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        check(compose(["experiment=mine", "peft=full"], config_dir=str(tmp_path)))
    (problem,) = raised.value.problems
    assert problem.startswith("peft.lora_rnak=4: no such key")
