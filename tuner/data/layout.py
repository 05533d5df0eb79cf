"""Data in rows, from files or from the Hugging Face Hub: where the rows are, and what a layout of rows is to this."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from tuner.data.bad_rows import CheckedExamples, RowSource
from tuner.data.dataset import Example, Preparation
from tuner.data.files import FileRows
from tuner.data.hub import HubRows
from tuner.data.records import Record
from tuner.types import NonNegativeInt


@dataclass(frozen=True)
class Layout(Preparation):
    """A member of the `data` group over rows: it adds the names of its columns, and what a row says.

    Args:
        path: a .jsonl, .json, .csv or .parquet file, a folder of such files or a pattern as `folder/*.jsonl`.
        source: instead, the name of a dataset on the Hugging Face Hub, ORG/NAME.
        subset: of a source: which of its configurations, None for its only or default one.
        split: of a source: which of its splits is trained on.
        revision: of a source: a branch, tag or commit, None for its main branch.
        val_path: files to validate on, as `path`; then no examples are set aside.
        val_split: of a source, the split to validate on; likewise.
        max_bad_rows: rows that may be bad and are left out aloud; one more is an error.
    """

    path: str | None
    source: str | None
    subset: str | None
    split: str
    revision: str | None
    val_path: str | None
    val_split: str | None
    max_bad_rows: NonNegativeInt

    name: ClassVar[str]

    @abstractmethod
    def example_of(self, record: Record) -> Example:
        """The example that a row is.

        Raises:
            DataError: naming what is wrong with the row, and where it was read.
        """

    def examples(self) -> CheckedExamples:
        if self.source is not None:
            return self._checked(self.name, HubRows(self.source, self.subset, self.split, self.revision))
        assert self.path is not None, "the check of a configuration refuses data without a place"
        return self._checked(self.name, FileRows("data.path", self.path))

    def validation_examples(self) -> CheckedExamples | None:
        name = f"{self.name}: validation"
        if self.val_path is not None:
            return self._checked(name, FileRows("data.val_path", self.val_path))
        if self.val_split is None:
            return None
        assert self.source is not None, "the check of a configuration refuses a split of nothing"
        return self._checked(name, HubRows(self.source, self.subset, self.val_split, self.revision))

    def _checked(self, name: str, rows: RowSource) -> CheckedExamples:
        return CheckedExamples(name, rows, self.example_of, self.max_bad_rows)
