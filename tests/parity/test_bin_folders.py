"""Folders with `.bin` weights, loaded and converted, against transformers' model whose weights they hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tuner
from tuner.__main__ import dispatch, reported
from tuner.errors import CheckpointError, ConfigError, ModelError
from tuner.models import writing
from tuner.models.folder import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE
from tuner.tokenizers.tiny import write_tiny_tokenizer

Folder = Callable[..., Path]
Reference = Callable[..., Any]


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return tuner.load_model(folder, dtype=torch.float32)(torch.arange(20)[None])  # type: ignore[no-any-return]


def write_bin(original: Path, folder: Path, files: int) -> Path:
    """As transformers wrote them before safetensors: one file, or several with an index."""
    folder.mkdir()
    (folder / "config.json").write_bytes((original / "config.json").read_bytes())
    tensors = load_file(original / SINGLE)
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if files == 1:
        torch.save(tensors, folder / BIN_SINGLE)
        return folder
    names = sorted(tensors)
    shards = {f"pytorch_model-{n + 1:05d}-of-{files:05d}.bin": names[n::files] for n in range(files)}
    for name, held in shards.items():
        torch.save({key: tensors[key].clone() for key in held}, folder / name)
    where = {key: name for name, held in shards.items() for key in held}
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.fixture(params=["llama", "llama, tied", "phi3", "gemma2"])
def original(request: pytest.FixtureRequest, family_folder: Folder) -> Path:
    family, _, tied = request.param.partition(", ")
    shape = {"tie_word_embeddings": True} if tied or family == "gemma2" else {}
    return family_folder(family, **shape, **({"head_dim": 8} if family == "gemma2" else {}))


@pytest.mark.parametrize("files", [1, 3])
def test_they_load_and_convert_to_the_bit(files: int, original: Path, reference: Reference, tmp_path: Path) -> None:
    folder = write_bin(original, tmp_path / "bin", files)
    assert torch.equal(logits(folder), logits(original))
    write_tiny_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    said = dispatch(["convert", f"source={folder}", f"dest={tmp_path}/dest"])
    assert said == f"source: Hugging Face folder, model_type={reference(original).config.model_type}\n" + (
        f"converted: {tmp_path}/dest"
    )
    found, expected = load_file(tmp_path / "dest" / SINGLE), load_file(original / SINGLE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(reference(tmp_path / "dest")(tokens).logits, reference(original)(tokens).logits)
    assert tuner.load_tokenizer(tmp_path / "dest").encode("the same") == tuner.load_tokenizer(folder).encode("the same")
    assert (tmp_path / "dest/generation_config.json").read_text() == '{"temperature": 0.5}'


@pytest.mark.parametrize("said", ["auto", "bf16"])
def test_many_files_are_rewritten_as_they_fill(
    said: str, family_folder: Folder, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = family_folder("llama")
    folder = write_bin(original, tmp_path / "bin", 2)
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 60_000)
    held: list[int] = []
    save = writing.save_file

    def counted(tensors: dict[str, Tensor], *rest: Any, **named: Any) -> None:
        held.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        save(tensors, *rest, **named)

    monkeypatch.setattr(writing, "save_file", counted)
    dispatch(["convert", f"source={folder}", f"dest={tmp_path}/dest", f"dtype={said}"])
    dest = tmp_path / "dest"
    index = json.loads((dest / INDEX).read_text())
    assert sorted(path.name for path in dest.glob("*.safetensors")) == sorted(set(index["weight_map"].values()))
    assert len(held) == len(set(index["weight_map"].values())) > 2
    assert max(held) <= 60_000
    assert sum(held) == index["metadata"]["total_size"]
    assert not list(dest.glob(".*"))
    theirs = reference(dest, torch.float32).state_dict()
    dtype = torch.bfloat16 if said == "bf16" else torch.float32
    for name, tensor in load_file(original / SINGLE).items():
        assert torch.equal(theirs[name], tensor.to(dtype).float()), name


def test_a_number_too_large_for_fp16_is_named(family_folder: Folder, tmp_path: Path) -> None:
    folder = write_bin(family_folder("llama"), tmp_path / "bin", 1)
    tensors = torch.load(folder / BIN_SINGLE, weights_only=True)
    tensors["model.norm.weight"][3] = -70_000.0
    torch.save(tensors, folder / BIN_SINGLE)
    dispatch(["convert", f"source={folder}", f"dest={tmp_path}/bf16", "dtype=bf16"])
    with pytest.raises(ModelError, match=r"model.norm.weight holds 70000, which is too large for fp16: say dtype=bf16"):
        dispatch(["convert", f"source={folder}", f"dest={tmp_path}/fp16", "dtype=fp16"])
    assert not (tmp_path / "fp16").exists()


def test_safetensors_win_where_both_are_there(family_folder: Folder, tmp_path: Path) -> None:
    original = family_folder("llama")
    folder = write_bin(original, tmp_path / "bin", 1)
    (folder / SINGLE).write_bytes((original / SINGLE).read_bytes())
    (folder / BIN_SINGLE).write_bytes(b"nothing that can be read")
    assert torch.equal(logits(folder), logits(original))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        tuner.load_model(folder, dtype=torch.float32)
    with pytest.raises(ModelError) as again:
        dispatch(["convert", f"source={folder}", f"dest={folder}-dest"])
    assert str(again.value) == str(caught.value)
    assert not Path(f"{folder}-dest").exists()
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_pickle_that_would_run_code_is_refused(family_folder: Folder, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = write_bin(family_folder("llama"), tmp_path / "bin", 1)
    torch.save({"model.norm.weight": Code()}, folder / BIN_SINGLE)
    assert f"{folder / BIN_SINGLE}: refused: its pickle asks for posix.mkdir, which is not part of" in refusal(folder)
    assert not (tmp_path / "ran").exists()
    torch.load(folder / BIN_SINGLE, weights_only=False)  # what it would have done
    assert (tmp_path / "ran").is_dir()


def test_what_is_damaged_or_no_tensors_is_named(family_folder: Folder, tmp_path: Path) -> None:
    folder = write_bin(family_folder("llama"), tmp_path / "bin", 1)
    whole = (folder / BIN_SINGLE).read_bytes()
    for kept in (5, 100, len(whole) // 2, len(whole) - 1):
        (folder / BIN_SINGLE).write_bytes(whole[:kept])
        assert f"{folder / BIN_SINGLE}: damaged or truncated, or not written by torch.save" in refusal(folder)
    (folder / BIN_SINGLE).write_bytes(b"")
    assert refusal(folder) == f"{folder / BIN_SINGLE}: empty"
    torch.save([1, 2], folder / BIN_SINGLE)
    assert "no dictionary of tensors" in refusal(folder)
    torch.save({"model.norm.weight": torch.ones(48)}, folder / BIN_SINGLE)
    assert "weights do not fit config.json: missing lm_head.weight [131, 48]" in refusal(folder)


def test_a_missing_file_of_several_is_named(family_folder: Folder, tmp_path: Path) -> None:
    folder = write_bin(family_folder("llama"), tmp_path / "bin", 3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    assert f"missing pytorch_model-00002-of-00003.bin, which {BIN_INDEX} names" in refusal(folder)


def test_an_architecture_that_is_not_known_is_named(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "mixtral"}')
    assert "model_type=mixtral is not supported; did you mean mistral" in refusal(tmp_path / "other")


def test_a_source_of_no_known_kind_is_told_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no weights")
    for source in (tmp_path, tmp_path / "text.gguf", tmp_path / "nowhere"):
        with pytest.raises(
            ConfigError, match=r"looked for a GGUF file .* config.json .* params.json and consol"
        ) as said:
            dispatch(["convert", f"source={source}", f"dest={tmp_path}/dest"])
        assert ("does not exist" in str(said.value)) is (source.name == "nowhere")


def test_a_dest_that_holds_something_is_left(family_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest/mine").touch()
    for dest in (tmp_path / "dest", tmp_path / "dest/mine"):
        with pytest.raises(ConfigError, match=f"dest={dest} exists and is not empty"):
            dispatch(["convert", f"source={family_folder('llama')}", f"dest={dest}"])
    (tmp_path / "dest/mine").unlink()
    dispatch(["convert", f"source={family_folder('llama')}", f"dest={tmp_path}/dest"])
    assert torch.equal(logits(tmp_path / "dest"), logits(family_folder("llama")))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_was_begun_is_taken_away(
    error: Any, family_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*given: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 60_000)
    saved = iter([writing.save_file, breaks])
    monkeypatch.setattr(writing, "save_file", lambda *given, **named: next(saved)(*given, **named))
    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        dispatch(["convert", f"source={family_folder('llama')}", f"dest={tmp_path}/dest"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command(family_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Relative paths with commas; then what is wrong as one line each, with exit code 2."""
    write_bin(family_folder("llama"), tmp_path / "a, b", 1)
    command = [sys.executable, "-m", "tuner", "convert", "source=a, b", "dest=to, there", "dtype=fp16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"converted: {tmp_path}/to, there\n")
    assert {tensor.dtype for tensor in load_file(tmp_path / "to, there" / SINGLE).values()} == {torch.float16}
    for words, said in (
        (["source=a, b", "dest=to, there"], "exists and is not empty"),
        (["source=a, b"], "dest"),
        (["source=a, b", "dest=new", "dtype=int8"], "dtype=int8: expected one of auto, fp32, bf16, fp16"),
        (["source=nothing", "dest=new"], "looked for"),
    ):
        assert reported(lambda words=words: dispatch(["convert", *words]), False) == 2  # type: ignore[misc]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert said in lines[0]
