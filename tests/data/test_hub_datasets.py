"""Datasets of the Hugging Face Hub through the library `datasets`, here over folders that it wrote itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tuner.config import compose
from tuner.config.checking import problems_of
from tuner.config.composition import plain
from tuner.data.hub import HubRows
from tuner.data.records import Record
from tuner.errors import ConfigError, DataError


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    rows = HubRows("org/name", None, "train", None)
    for use in (lambda: next(iter(rows)), rows.content_digest):
        with pytest.raises(ConfigError, match=r"data\.source=org/name: needs .*: pip install 'tuner\[datasets\]'"):
            use()


def test_a_folder_of_the_same_name_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"data\.source=org/name: there is a folder of that name here"):
        next(iter(HubRows("org/name", None, "train", None)))


def test_a_commit_needs_no_question() -> None:
    def digest(subset: str | None, split: str, commit: str) -> str:
        return HubRows("org/name", subset, split, commit).content_digest()

    pytest.importorskip("datasets")
    different = {digest(*facts) for facts in [(None, "a", "1" * 40), ("s", "a", "1" * 40), (None, "b", "1" * 40)]}
    assert len(different | {digest(None, "a", "2" * 40), digest(None, "a", "1" * 40)}) == 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets")
    place = tmp_path_factory.mktemp("saved")
    rows = [{"prompt": f"{i}?", "response": f"{i}!", "turns": [{"from": "gpt", "value": str(i)}]} for i in range(1000)]
    for split, part in {"train": rows[:900], "test": rows[900:]}.items():
        datasets.Dataset.from_list(part).to_parquet(place / f"{split}-00000-of-00001.parquet")
    return place


@pytest.mark.slow
def test_rows_are_those_of_the_split_in_every_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder.parent))
    rows = HubRows(str(folder), None, "test", None)
    for _ in range(2):
        found = list(rows)
        assert found == [
            Record(
                {"prompt": f"{i}?", "response": f"{i}!", "turns": [{"from": "gpt", "value": str(i)}]},
                f"{folder}: test: row {i - 899}",
            )
            for i in range(900, 1000)
        ]
    assert not list(folder.parent.rglob("*.arrow")), "streamed, and not converted first"


@pytest.mark.slow
def test_a_split_or_a_dataset_that_is_not_there(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.split=dev: .*(train|test)"):
        list(HubRows(str(folder), None, "dev", None))
    with pytest.raises(DataError, match=r"^data\.source=org/nowhere data\.revision=main: not known"):
        list(HubRows("org/nowhere", None, "train", None))


def test_what_the_check_says_of_a_source() -> None:
    def problems(*words: str) -> list[str]:
        return [problem.sentence for problem in problems_of(plain(compose(["data=messages", *words])))]

    assert problems("data.source=org/name", "data.val_split=test", "data.revision=main", "data.subset=all") == []
    assert problems("data.path=a.csv", "data.val_path=b.csv") == []
    for words, sentence in {
        (): "data.path: needs a value, as data.path=FILE",
        ("data.path=a", "data.source=org/name"): "data.path=a data.source=org/name: data is in files or on the",
        ("data.source=./folder",): "data.source=./folder: expected ORG/NAME",
        ("data.path=a", "data.val_split=test"): "of which dataset? say data.source=ORG/NAME too",
        ("data.source=o/n", "data.val_split=a", "data.val_path=b"): "data.val_path=b data.val_split=a: two places",
    }.items():
        (problem,) = problems(*words)
        assert sentence in problem
