"""Rows of a dataset on the Hugging Face Hub, streamed by the library `datasets`: the extra of that name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tuner.data.records import Record, Row
from tuner.errors import ConfigError, DataError
from tuner.hub import pinned_dataset, reachable_dataset
from tuner.hub_errors import DATASET, is_repository


@dataclass(frozen=True)
class HubRows:
    """Rows of one split in their order; of its files there is no more in memory than what is read ahead.

    Args:
        source: ORG/NAME; a folder is read as the repository that it could be uploaded as.
        subset: one of its configurations, None for its only or default one.
        split: as `train`.
        revision: a branch, tag or commit, None for main.
    """

    source: str
    subset: str | None
    split: str
    revision: str | None

    def __iter__(self) -> Iterator[Row]:
        """One pass.

        Raises:
            ConfigError: the extra `datasets` is not installed, or a folder here has the name of the source.
            DataError: there is no such dataset, subset or split, or it cannot be reached or read.
        """
        if is_repository(self.source) and Path(self.source).is_dir():
            raise ConfigError(
                f"data.source={self.source}: there is a folder of that name here, which the library datasets would read"
                " instead; start the command elsewhere, or say data.path=FOLDER"
            )
        number = 0
        with self._errors():
            from datasets import load_dataset

            if self.commit is not None and is_repository(self.source):
                reachable_dataset(self.source, self.commit)  # else datasets looks for another commit in its cache
            rows = load_dataset(self.source, self.subset, split=self.split, revision=self.commit, streaming=True)
            for number, fields in enumerate(rows, start=1):
                yield Record(fields, f"{self.source}: {self.split}: row {number}")
        if not number:
            raise DataError(f"data.source={self.source} data.split={self.split}: the split holds no examples")

    def content_digest(self) -> str:
        """Of the commit that the revision names now, and of what is read of it.

        Raises:
            ConfigError, DataError: as a pass.
        """
        return hashlib.sha256(repr((self.source, self.subset, self.split, self.commit)).encode()).hexdigest()

    @cached_property
    def commit(self) -> str | None:
        """What the revision named when this was first asked, so that every pass reads the same; of a folder, nothing.

        Raises:
            ConfigError, DataError: as a pass.
        """
        return pinned_dataset(self.source, self.revision) if is_repository(self.source) else self.revision

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            import datasets  # noqa: F401
            import httpx2
        except ImportError as error:
            raise ConfigError(f"data.source={self.source}: needs {DATASET.needs[1]}") from error
        try:
            yield
        except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"data.source={self.source} data.split={self.split}: {said}") from error
