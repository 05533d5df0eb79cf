"""Samples in flat files, of which a process holds in memory what it is looking at.

A folder has `tokens.bin` (int32, little-endian, one sample behind the other), `trained.bin` (a byte for each token) and
for each side a `.npy` of where its samples are, [samples, 2]: the first token and the number of tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from tuner.types import IGNORE, Sample

TOKEN = np.dtype("<i4")
SIDES = ("train", "validation")
TOKENS, TRAINED = "tokens.bin", "trained.bin"
FILES = (TOKENS, TRAINED, *(f"{side}.npy" for side in SIDES))

_AT_ONCE = 1024  # samples


class StoredSamples(Sequence[Sample]):
    """Samples that are made when they are asked for.

    The files may be deleted meanwhile: what is open stays.

    Args:
        tokens: int32 [tokens of all samples], as a memory map.
        trained: uint8, the same length; 0 where a token is not trained on.
        spans: int64 [samples, 2].
    """

    def __init__(self, tokens: NDArray[np.int32], trained: NDArray[np.uint8], spans: NDArray[np.int64]) -> None:
        self._tokens, self._trained, self._spans = tokens, trained, spans

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, without looking at any of them."""
        return self._spans[:, 1]

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return StoredSamples(self._tokens, self._trained, self._spans[index])
        start, length = (int(number) for number in self._spans[index])
        ids, trained = self._tokens[start : start + length], self._trained[start : start + length]
        return Sample(_ints(ids), _ints(np.where(trained, ids, IGNORE)))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class SampleWriter:
    """Writes the files of a folder.

    Args:
        folder: exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = (folder / TOKENS).open("xb"), (folder / TRAINED).open("xb")
        self._size = 0

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, *raised: object) -> None:
        for file in self._files:
            file.close()

    def add(self, tokens: NDArray[np.int32], trained: NDArray[np.uint8]) -> int:
        """Write the tokens of one or more samples; returns where the first token stands."""
        start = self._size
        tokens_file, trained_file = self._files
        tokens_file.write(tokens.astype(TOKEN, copy=False).tobytes())
        trained_file.write(trained.tobytes())
        self._size += len(tokens)
        return start

    def finish(self, side: str, spans: NDArray[np.int64]) -> None:
        """Write where the samples of one side are, in its order."""
        np.save(self._folder / f"{side}.npy", spans)


def read_samples(folder: Path) -> list[StoredSamples]:
    """The samples of both sides.

    Raises:
        OSError, ValueError: files that are missing or damaged.
    """
    tokens = np.memmap(folder / TOKENS, dtype=TOKEN, mode="r")
    trained = np.memmap(folder / TRAINED, dtype=np.uint8, mode="r")
    return [StoredSamples(tokens, trained, np.load(folder / f"{side}.npy")) for side in SIDES]


def fingerprint(*sides: Sequence[Sample]) -> str:
    """sha256, in hex, over the tokens and labels of all samples in their order."""
    digest = hashlib.sha256()
    for samples in sides:
        digest.update(len(samples).to_bytes(8, "little"))
        for sample in samples:
            digest.update(len(sample.tokens).to_bytes(8, "little"))
            digest.update(np.asarray(sample.tokens, dtype=TOKEN).tobytes())
            digest.update(np.asarray(sample.labels, dtype=TOKEN).tobytes())
    return digest.hexdigest()


def fingerprint_of_files(folder: Path) -> str:
    """`fingerprint` of the samples of a folder, read in pieces: a memory map would count as memory that is used."""
    digest = hashlib.sha256()
    with (folder / TOKENS).open("rb") as tokens, (folder / TRAINED).open("rb") as trained:
        for side in SIDES:
            spans = np.load(folder / f"{side}.npy")
            digest.update(len(spans).to_bytes(8, "little"))
            for group in _neighbours(spans):
                start, stop = int(group[0, 0]), int(group[-1].sum())
                ids = _read(tokens, TOKEN, start, stop)
                labels = np.where(_read(trained, np.dtype(np.uint8), start, stop), ids, IGNORE).astype(TOKEN)
                for first, length in (group - [start, 0]).tolist():
                    digest.update(length.to_bytes(8, "little"))
                    digest.update(ids[first : first + length].data)
                    digest.update(labels[first : first + length].data)
    return digest.hexdigest()


def _neighbours(spans: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Samples in their order, in groups that stand one behind the other."""
    at_once = _AT_ONCE if (np.diff(spans[:, 0]) > 0).all() else 1
    return (spans[at : at + at_once] for at in range(0, len(spans), at_once))


def _read(file: Any, dtype: np.dtype[Any], start: int, stop: int) -> NDArray[Any]:
    file.seek(start * dtype.itemsize)
    return np.frombuffer(file.read((stop - start) * dtype.itemsize), dtype)


def _ints(values: NDArray[Any]) -> array[int]:
    made = array("i")
    made.frombytes(np.ascontiguousarray(values, dtype=np.int32).tobytes())
    return made
