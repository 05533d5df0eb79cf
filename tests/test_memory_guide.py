"""The guide's tables are what `benchmarks/memory_guide.py` writes now, and no technique is without a line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tuner

ROOT = Path(tuner.__file__).parents[1]
CONF = ROOT / "conf"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("memory_guide", ROOT / "benchmarks" / "memory_guide.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


GUIDE = script()
TEXT = GUIDE.GUIDE.read_text()
MEASURED = json.loads(GUIDE.MEASURED.read_text())
PARTS = {part.name: part for part in GUIDE.PARTS}
AS_COMPOSED = {"quantization=none", "optimizer=adamw", "memory=default"}
"""What a base has without saying it."""


def said() -> set[str]:
    """The words of all lines."""
    return AS_COMPOSED.union(*({*part.base, *row.words} for part in GUIDE.PARTS for row in part.rows))


@pytest.mark.parametrize("group", ["peft", "quantization", "precision", "optimizer", "memory"])
def test_every_member_of_a_group_has_a_line_or_a_reason(group: str) -> None:
    members = {f"{group}={file.stem}" for file in (CONF / group).glob("*.yaml")}
    reasons = {word for word in GUIDE.NO_ROW if word.startswith(f"{group}=")}
    assert members - said() == reasons
    assert all(GUIDE.NO_ROW[word] for word in reasons)


def test_every_key_of_the_memory_group_has_a_line_or_a_reason() -> None:
    keys = {f"memory.{key}" for key in yaml.safe_load((CONF / "memory" / "default.yaml").read_text()) if key[0] != "_"}
    assert len(keys) >= 3
    assert keys == {word.partition("=")[0] for word in {*said(), *GUIDE.NO_ROW} if word.startswith("memory.")}


def test_what_was_measured_are_the_lines_that_are_to_be() -> None:
    wanted = {part.name: {row.title for row in GUIDE.lines_of(part) if row.measured} for part in GUIDE.PARTS}
    assert {name: set(found) for name, found in MEASURED["parts"].items()} == wanted
    numbers = [value for found in MEASURED["parts"].values() for row in found.values() for value in row.values()]
    assert all(value > 0 for value in numbers)


def test_every_line_and_figure_has_its_place_in_the_guide() -> None:
    for part in GUIDE.PARTS:
        lines = GUIDE.in_guide(TEXT, part.name).splitlines()
        assert lines[:2] == list(GUIDE.HEAD)
        assert [line.count("|") for line in lines] == [GUIDE.HEAD[0].count("|")] * (len(part.rows) + 3)
    figures = GUIDE.in_guide(TEXT, "published")
    assert all(f"| {one.name} (" in figures for one in GUIDE.PUBLISHED)
    assert {one.source for one in GUIDE.PUBLISHED} == set(GUIDE.SOURCES)
    assert GUIDE.in_guide(TEXT, "settings") == GUIDE.settings_text(MEASURED)


def test_a_line_is_what_is_predicted_now() -> None:
    part = PARTS["quantization"]
    nf4 = next(row for row in part.rows if row.title == "quantization=nf4")
    assert GUIDE.line(part, nf4, MEASURED) in GUIDE.in_guide(TEXT, part.name).splitlines()


@pytest.mark.slow
def test_the_guide_is_what_the_script_writes() -> None:
    written = GUIDE.rewritten(TEXT, GUIDE.blocks(MEASURED))
    assert written == TEXT, "run python benchmarks/memory_guide.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PARTS))
def test_what_was_measured_is_what_is_predicted(name: str) -> None:
    part = PARTS[name]
    for row in [row for row in GUIDE.lines_of(part) if row.measured][::2]:
        predicted = GUIDE.predicted(GUIDE.measured_words(part, row)).total / GUIDE.MIB
        measured = MEASURED["parts"][name][row.title]["peak_mib"]
        assert predicted == pytest.approx(measured, rel=0.02)


@pytest.mark.slow
def test_measuring() -> None:
    small = GUIDE.Setting("tiny", "cpu", 2, 16)
    rows = (GUIDE.Row(("quantization=nf4",)), GUIDE.Row(("optimizer=muon",), measured=False))
    found = GUIDE.measured_part(GUIDE.Part("some", ("peft=lora",), rows, small), rounds=1)
    assert set(found) == {"", "quantization=nf4"}
    assert found[""]["time_of_base"] == 1
    assert found[""]["peak_mib"] > found["quantization=nf4"]["peak_mib"] > 0
    assert all(one["cpu_s_a_step"] > 0 for one in found.values())


def test_parts_measured_on_another_machine_are_not_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "measured.json"
    other.write_text(json.dumps({**MEASURED, "run": {**MEASURED["run"], "torch": "1.0"}}))
    monkeypatch.setattr(GUIDE, "MEASURED", other)
    with pytest.raises(ValueError, match="measure all parts"):
        GUIDE.measure(["precision"], MEASURED["run"]["rounds"])


def test_markers() -> None:
    text = f"before\n{GUIDE.begin('a')}\nold\n{GUIDE.end('a')}\nafter\n"
    assert GUIDE.rewritten(text, {"a": "new\nlines"}) == text.replace("old", "new\nlines")
    assert GUIDE.in_guide(text, "a") == "old"
    with pytest.raises(ValueError, match="each once"):
        GUIDE.rewritten(text, {"a": "new", "b": "new"})
    with pytest.raises(ValueError, match="each once"):
        GUIDE.rewritten(text + text, {"a": "new"})
    with pytest.raises(ValueError, match="nothing is generated for a"):
        GUIDE.rewritten(text, {})


def test_words() -> None:
    part = PARTS["batches"]
    packed = GUIDE.words_of(part, part.rows[1], GUIDE.LARGE)
    assert [word for word in packed if word.startswith("data.")] == [
        "data.packing=pack",
        "data.max_seq_len=512",
        "data.pack_len=2048",
    ]
    assert "train.batch_size=2" in packed
    assert "train.batch_size=2" not in GUIDE.words_of(part, part.rows[0], GUIDE.LARGE)
    assert "precision=fp32" in GUIDE.measured_words(part, part.rows[0])
    assert GUIDE.merged(("a=1", "b=2"), ("a=3",)) == ("b=2", "a=3")
    assert GUIDE.change(1.001) == ""
    assert GUIDE.change(0.5) == "-50 %"
