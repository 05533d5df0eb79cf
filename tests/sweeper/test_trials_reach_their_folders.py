"""What a sweep hands to its launcher: words that Hydra reads as they were meant, whatever the folder is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from sweeper.folder import SweepFolder
from sweeper.grid import GridSweeper
from sweeper.plan import Trial
from sweeper.trial import logs_of, summary_of


class Recorder:
    """A launcher that runs nothing; each job ends as it is told."""

    def __init__(self, errors: Sequence[Exception | None] = (None,)) -> None:
        self.errors = errors
        self.jobs: list[list[str]] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        self.jobs += [list(words) for words in job_overrides]
        states = [JobStatus.FAILED if error else JobStatus.COMPLETED for error in self.errors]
        return [JobReturn(status=state, _return_value=error) for state, error in zip(states, self.errors, strict=True)]


def launch(folder: SweepFolder, ids: Sequence[str], launcher: Recorder) -> GridSweeper:
    sweeper = GridSweeper()
    sweeper.launcher = launcher  # type: ignore[assignment]
    sweeper.launch(folder, [Trial(name, ["seed=1"], {"seed": "1"}, OmegaConf.create()) for name in ids])
    return sweeper


def values(words: Sequence[str]) -> dict[str, Any]:
    return {word.key_or_group: word.value() for word in OverridesParser.create().parse_overrides(list(words))}


@pytest.mark.parametrize(
    "name",
    [
        "0a1b2c3d",
        "12345678",
        "00000000",
        "0000e123",
        pytest.param("12345e67"),
        pytest.param("1e234567"),
    ],
)
def test_a_trial_s_folder_is_its_id(name: str, tmp_path: Path) -> None:
    launcher = Recorder()
    launch(SweepFolder(tmp_path), [name], launcher)
    given = values(launcher.jobs[0])
    assert Path(given["hydra.sweep.dir"], str(given["hydra.sweep.subdir"])) == tmp_path / name
    assert given["seed"] == 1


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "two words, and [more]",
        "a=b",
        "1e5",
        "null",
        "it's here",
        "ends in \\",
        pytest.param("odd \\' one"),
    ],
)
def test_the_sweep_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    launcher = Recorder()
    launch(SweepFolder(tmp_path / name), ["0a1b2c3d"], launcher)
    assert values(launcher.jobs[0])["hydra.sweep.dir"] == str(tmp_path / name)


def test_a_job_that_failed_leaves_a_summary_and_its_log(tmp_path: Path) -> None:
    told, untold = ValueError("no good"), KeyError()
    log = tmp_path / ".submitit" / "log.err"
    log.parent.mkdir()
    log.write_text("what it printed")
    told.add_note(f"log {log}")
    folder = SweepFolder(tmp_path)
    launch(folder, ["aaaaaaaa", "bbbbbbbb", "cccccccc"], Recorder([told, None, untold]))
    assert [file.read_text() for file in logs_of(folder.out("aaaaaaaa"))] == ["what it printed"]
    assert logs_of(folder.out("cccccccc")) == []
    reasons = [(summary_of(folder.out(name)) or {}).get("reason") for name in ("aaaaaaaa", "bbbbbbbb", "cccccccc")]
    assert reasons == ["no good", None, "KeyError"]
