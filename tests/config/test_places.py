"""A folder's or the hub's model has the shape its config.json states: words about the shape are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuner.config import compose
from tuner.errors import UnknownKey


@pytest.mark.parametrize("place", ["model.path=/folder", "model.source=org/name"])
@pytest.mark.parametrize(
    "word",
    [
        "model.hidden_size=96",
        "model.tie_word_embeddings=true",
        "+model.more=1",
        "+scale=tiny",
        "model.random_weights=true",
    ],
)
def test_a_word_about_the_shape_is_refused_beside_a_place(place: str, word: str) -> None:
    with pytest.raises(UnknownKey) as raised:
        compose([word, place, "model.rope_scaling={rope_type: linear, factor: 2.0}", "model=tiny"])
    assert raised.value.problems == [
        f"{said} {place}: its config.json gives the shape and its weights are loaded, so this would be ignored"
        for said in (word, "model.rope_scaling={rope_type: linear, factor: 2.0}")
    ]


def test_a_preset_beside_a_place_and_a_shape_without_one_are_fine() -> None:
    assert compose(["model=llama2_7b", "model.path=/folder", "model.revision=null"]).model.path == "/folder"
    assert compose(["model=tiny", "model.hidden_size=96"]).model.hidden_size == 96
    assert compose(["model=tiny", "model.path=/folder"]).model.path == "/folder"


def test_a_verb_is_no_exception(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UnknownKey, match="this would be ignored"):
        compose([f"model.path={tmp_path}", "model.vocab_size=7", "prompt=x"], config_name="verb/generate")
