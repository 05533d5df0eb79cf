"""The frozen base is told by a fingerprint that is cheap and sees what happens to model folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tuner.checkpoint.base import BLOCK, BLOCKS, WHOLE, base_fingerprint

LARGE = 3 * WHOLE // 4  # fp32 elements: three times what is read whole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for part in (1, 2):
        tensors = {f"layer{part}": torch.randn(LARGE if part == 1 else 50, generator=generator)}
        save_file(tensors, folder / f"model-0000{part}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8}))
    return folder


def change(name: str, at: int) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.seek(at, 0 if at >= 0 else 2)
            byte = file.read(1)
            file.seek(at, 0 if at >= 0 else 2)
            file.write(bytes([byte[0] ^ 1]))

    return apply


def renamed_tensor(folder: Path) -> None:
    file = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    save_file({"layer9": tensors["layer1"]}, file)


def another_fine_tuning(folder: Path) -> None:
    file = folder / "model-00001-of-00002.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(file).items()}, file)


CHANGES: dict[str, Callable[[Path], object]] = {
    "another fine-tuning": another_fine_tuning,
    "a tensor of another name": renamed_tensor,
    "first byte of the data": change("model-00001-of-00002.safetensors", 8 + 80),
    "last byte": change("model-00001-of-00002.safetensors", -1),
    "any byte of a small file": change("model-00002-of-00002.safetensors", 150),
    "config.json": lambda folder: (folder / "config.json").write_text(json.dumps({"hidden_size": 9})),
    "a file less": lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
    "a file more": lambda folder: shutil.copy(folder / "config.json", folder / "pytorch_model.bin"),
    "half copied": lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(
        (folder / "model-00001-of-00002.safetensors").read_bytes()[: 2 * WHOLE]
    ),
}


@pytest.mark.parametrize("apply", CHANGES.values(), ids=CHANGES)
def test_another_base_has_another_fingerprint(folder: Path, apply: Callable[[Path], object]) -> None:
    before = base_fingerprint(folder)
    apply(folder)
    assert base_fingerprint(folder) != before


def test_a_copy_elsewhere_with_another_readme_is_the_same_base(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("moved")
    assert base_fingerprint(copy) == base_fingerprint(folder)


def test_little_of_a_large_file_is_read(tmp_path: Path) -> None:
    """A sparse file of 200 GB takes no longer than its samples."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((1000).to_bytes(8, "little") + b" " * 1000)
        file.truncate(200 * 10**9)
    read: list[int] = []

    def counted(path: Path, mode: str) -> object:
        opened = original(path, mode)
        read_of = opened.read

        class Counting:
            def __enter__(self) -> Counting:
                return self

            def __exit__(self, *error: object) -> None:
                opened.close()

            seek = staticmethod(opened.seek)

            @staticmethod
            def read(size: int) -> bytes:
                found: bytes = read_of(size)
                read.append(len(found))
                return found

        return Counting()

    original = Path.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", counted)
        base_fingerprint(tmp_path)
    assert sum(read) == 8 + 8 + 1000 + BLOCK * BLOCKS
