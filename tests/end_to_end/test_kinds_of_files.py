"""One dataset as files of every kind: each command trains on the same samples."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROWS = [{"ask": f"Add {i} to {i % 7}, please.", "reply": f"It is\n{i + i % 7}."} for i in range(60)]
WORDS = [
    "model=tiny",
    "data=instruct",
    "data.prompt_column=ask",
    "data.response_column=reply",
    "data.max_seq_len=128",
    "train.max_steps=2",
    "logger=none",
    "train.num_samples=0",
    "train.num_threads=1",
]


def written(folder: Path) -> list[Path]:
    """The rows as a file of each kind, and as a folder of several."""
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=2))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=7)
    with (folder / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["ask", "reply"])
        writer.writeheader()
        writer.writerows(ROWS)
    (folder / "parts").mkdir()
    for i, start in enumerate(range(0, 60, 20)):
        (folder / "parts" / f"part-{i}.jsonl").write_text("".join(lines[start : start + 20]))
    return [*(folder / f"rows.{kind}" for kind in ("jsonl", "json", "parquet", "csv")), folder / "parts"]


@pytest.mark.slow
def test_every_kind_of_file_trains_on_the_same_samples(shell: Any, tmp_path: Path) -> None:
    places = [*map(str, written(tmp_path)), f"{tmp_path}/parts/*.jsonl"]
    summaries = []
    for i, place in enumerate(places):
        first = shell if place.endswith(".parquet") else shell.inside  # one as a process of its own
        done = first(*WORDS, f"data.path={place}", f"out={tmp_path}/out{i}")
        assert done.code == 0, done.err
        dataset = json.loads((tmp_path / f"out{i}" / "environment.json").read_text())["dataset"]
        summary = json.loads((tmp_path / f"out{i}" / "summary.json").read_text())
        summaries.append((dataset["fingerprint"], dataset["counts"], summary["val_loss"], summary["train_loss"]))
    assert summaries == [summaries[0]] * len(places)
    assert summaries[0][1]["examples"] == 60
