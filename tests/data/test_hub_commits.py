"""`data.source`: a dataset of the Hugging Face Hub at one commit, from a stand-in on loopback, by the real commands."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import tuner
from tests.models.hub_commands import NOWHERE, Command
from tests.models.hub_server import HubServer, Repository, serving
from tuner.config import compose

pytest.importorskip("datasets")

FIRST, SECOND = "a" * 39 + "1", "b" * 39 + "2"
SHORT = ["model=tiny", "peft.lora_rank=2", "train.max_steps=1", "train.num_samples=0", "train.batch_size=2"]
WORDS = [*SHORT, "logger=none", "data=alpaca"]
FREEZE = """
import sys, tuner
from omegaconf import OmegaConf
OmegaConf.save(tuner.freeze(tuner.compose(sys.argv[1:])), "frozen.yaml")
"""


def rows(second: int) -> list[dict[str, str]]:
    return [{"instruction": f"Add {i} to {second}.", "input": "", "output": f"{i + second}"} for i in range(40)]


def lines(second: int) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows(second)).encode()


def table(second: int) -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(second)), stream)
    return stream.getvalue()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """Two commits of one dataset: other rows, in another kind of file; only the first has a card."""
    commits = {
        FIRST: {"README.md": b"---\nlicense: mit\n---\nSums.\n", "train.jsonl": lines(1)},
        SECOND: {"data/train-00000-of-00001.parquet": table(2)},
    }
    with serving() as server:
        server.repositories["datasets/org/sums"] = Repository(commits, FIRST)
        yield server


@pytest.fixture
def command(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """With caches of its own: no other test has prepared anything."""
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    return Command(hub, tmp_path / "hf")


def data_keys(out: str | Path) -> dict[str, Any]:
    return dict(yaml.safe_load((Path(out) / "config.yaml").read_text())["data"])


def fingerprint(out: str) -> str:
    return str(json.loads((Path(out) / "environment.json").read_text())["dataset"]["fingerprint"])


@pytest.mark.slow
def test_what_was_frozen_is_read_after_main_has_moved(hub: HubServer, command: Command, tmp_path: Path) -> None:
    of_files = []
    for number in (1, 2):
        (tmp_path / f"{number}.jsonl").write_bytes(lines(number))
        of_files.append(command("data", *WORDS, f"data.path={number}.jsonl").out)
    frozen = command.python("-c", FREEZE, *WORDS, "data.source=org/sums", "out=run")
    assert (frozen.code, hub.gets()) == (0, ["README.md"]), frozen.err
    hub.repositories["datasets/org/sums"].main = SECOND
    done = command("--config-dir=.", "--config-name=frozen", "hydra.run.dir=run")
    assert done.code == 0, done.err
    assert data_keys("run")["revision"] == FIRST
    assert f" {fingerprint('run')[:16]}" in of_files[0], "the same rows as in the file"
    assert f"alpaca, org/sums at commit {FIRST[:12]}: 40 examples" in (tmp_path / "run/run.log").read_text()

    moved = command(*WORDS, "data.source=org/sums", "out=moved")
    assert moved.code == 0, moved.err
    assert data_keys("moved")["revision"] == SECOND
    assert f" {fingerprint('moved')[:16]}" in of_files[1]

    hub.requests.clear()
    longer = command(*WORDS, "data.source=org/sums", "train.max_steps=2", "out=run")
    assert longer.code == 0, longer.err
    assert data_keys("run")["revision"] == FIRST, "a revision that is not said is that of the run folder"
    assert hub.requests == [], "and its rows are prepared"
    changed = command(*WORDS, "data.source=org/sums", "data.revision=main", "out=run")
    assert changed.code == 2
    assert changed.errors[0].startswith(f"error: {tmp_path}/run holds another run: data.revision was {FIRST}")


@pytest.mark.slow
def test_what_was_prepared_needs_no_hub(hub: HubServer, command: Command, tmp_path: Path) -> None:
    shown = command("data", *WORDS, "data.source=org/sums")
    assert shown.code == 0, shown.err
    hub.requests.clear()
    for words, env in (
        (["data.source=org/sums", f"data.revision={FIRST}", "out=pinned"], {"HF_ENDPOINT": NOWHERE}),
        (["data.source=org/sums", "out=offline"], {"HF_HUB_OFFLINE": "1"}),
    ):
        done = command(*WORDS, *words, **env)
        assert done.code == 0, done.err
        assert data_keys(words[-1].removeprefix("out="))["revision"] == FIRST
        assert fingerprint(words[-1].removeprefix("out="))[:16] in shown.out
    for env, sentence in (
        ({"HF_ENDPOINT": NOWHERE}, f"{NOWHERE} cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE=1 forbids to ask for it"),
    ):
        done = command(*WORDS, "data.source=org/sums", f"data.revision={FIRST}", "data.cache=false", "out=read", **env)
        assert (done.code, len(done.errors)) == (2, 1), done.err
        assert f"error: data.source=org/sums data.revision={FIRST}: " in done.errors[0]
        assert sentence in done.errors[0]
        assert not (tmp_path / "read").exists()
    assert hub.requests == []


REFUSED = [
    ("org/nothing", "main", {}, "no such repository at http"),
    ("org/sums", "v9", {}, "data.source=org/sums data.revision=v9: no such revision"),
    ("org/sums", "c" * 40, {}, "no such revision; http"),
    ("org/gated", "main", {}, "/datasets/org/gated and give a token: `hf auth login`"),
    ("org/ill", "main", {}, "answers with an error (503)"),
    ("org/sums", "main", {"HF_ENDPOINT": NOWHERE}, f"{NOWHERE} cannot be reached"),
    ("org/sums", "main", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE=1 forbids to ask for it"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "revision", "env", "sentence"), REFUSED, ids=[row[3][-40:] for row in REFUSED])
def test_what_the_hub_does_not_give_is_one_line_and_leaves_nothing(
    source: str, revision: str, env: dict[str, str], sentence: str, hub: HubServer, command: Command, tmp_path: Path
) -> None:
    files = {"train.jsonl": lines(1)}
    hub.repositories["datasets/org/gated"] = Repository({FIRST: files}, FIRST, gated=True)
    hub.repositories["datasets/org/ill"] = Repository({FIRST: files}, FIRST, status=503)
    done = command(*WORDS, f"data.source={source}", f"data.revision={revision}", "out=mine", **env)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith(f"error: data.source={source} data.revision={revision}: ")
    assert sentence in done.err
    assert not (tmp_path / "mine").exists()
    assert hub.gets() == []


@pytest.mark.slow
def test_every_trial_of_a_sweep_has_one_commit_also_when_it_goes_on(
    hub: HubServer, command: Command, tmp_path: Path
) -> None:
    words = ["-m", *WORDS, "data.source=org/sums", "hydra.sweep.dir=sweep"]
    away = command(*words, "seed=1,2", HF_ENDPOINT=NOWHERE)
    assert (away.code, len(away.errors)) == (2, 1), away.err
    assert not (tmp_path / "sweep").exists()

    first = command(*words, "seed=1")
    assert first.code == 0, first.err
    hub.repositories["datasets/org/sums"].main = SECOND
    hub.requests.clear()
    done = command(*words, "seed=1,2")
    assert done.code == 0, done.err
    outs = [file.parent for file in (tmp_path / "sweep").glob("*/config.yaml")]
    assert [data_keys(out)["revision"] for out in outs] == [FIRST, FIRST]
    assert hub.requests == []
    assert f"data.revision={FIRST}" in done.out, "the command of the best trial names the commit"


def test_the_words_that_continue_a_stopped_run_name_the_commits() -> None:
    from tuner.logging.header import resume_command

    of_data = {"source": "org/sums", "revision": FIRST}
    config = {"checkpoint": {"resume": "auto"}, "model": {"source": None}, "data": of_data}
    words = resume_command(Path("/mine"), config, ["data.source=org/sums", "data.revision=main"])
    assert words == f"python -m tuner data.source=org/sums data.revision={FIRST} out=/mine"
    config["model"] = {"source": "org/tiny", "revision": SECOND}
    words = resume_command(Path("/mine"), config, ["model.source=org/tiny", "data.source=org/sums"])
    assert words.endswith(f"data.source=org/sums model.revision={SECOND} data.revision={FIRST} out=/mine")


def test_freezing_a_pinned_configuration_changes_nothing() -> None:
    asked = compose([*WORDS, "data.source=org/sums", f"data.revision={FIRST}", "out=mine"])
    frozen = tuner.freeze(asked)
    assert frozen.data.revision == FIRST, "a commit is not asked for: no hub is reached here"
    assert tuner.freeze(frozen) == frozen
    assert os.environ["HF_HUB_OFFLINE"] == "1"
