"""A job that SLURM has started again while its first process still ends, or lives on a node that was given up."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import tuner
from sweeper import trial
from sweeper.errors import JobDied
from sweeper.launchers import slurm_queue
from sweeper.tracking import publish
from tuner import tracking
from tuner.checkpoint.lock import only_run_in
from tuner.types import Summary

WORDS = ["model=tiny", "logger=none", "train.num_samples=0", "train.val_every_steps=null", "train.max_steps=2"]


def test_a_trial_waits_for_another_process_and_goes_on_from_what_that_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Add {i} to 2.", "input": "", "output": f"It is {i + 2}."} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*WORDS, "data=alpaca", f"data.path={data}", "data.val_fraction=0.1"]
    out = tmp_path / "sweep" / "trial"
    trial.prepare(out, tuner.freeze(tuner.compose([*words, f"out={out}"])), words)
    monkeypatch.setattr(trial, "LOOK_S", 0.02)
    ended: list[Summary] = []
    second = threading.Thread(target=lambda: ended.append(trial.run_trial(out)))
    with only_run_in(out):
        second.start()
        said = ""
        while "waiting for its end" not in said:
            said += capsys.readouterr().out
            assert second.is_alive()
            time.sleep(0.01)
        time.sleep(0.2)
        assert "waiting for its end" not in capsys.readouterr().out, "it is said once"
        assert not ended
        assert trial.summary_of(out) is None, "nothing is said of a trial that another process runs"
    second.join()
    assert [summary.status for summary in ended] == ["finished"]
    with only_run_in(out):
        assert trial.run_trial(out).status == "finished", "it has finished meanwhile, so there is nothing to wait for"


@pytest.mark.parametrize("goes_on", [True, False])
def test_an_end_that_came_to_mlflow_as_the_trial_began_again_is_not_the_last(
    goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / trial.SUMMARY
    summary.write_text('{"status": "stopped"}')
    record = tracking.MlflowRecord("sqlite:///none.db", "tuner", "run", complete=False)
    record.write(tmp_path)

    def sync(out: Path) -> str:
        replace(record, complete=True).write(out)
        if goes_on:
            summary.unlink()  # as a run does that begins
        return ""

    monkeypatch.setattr(tracking, "sync", sync)
    assert publish(tmp_path) is None
    assert tracking.MlflowRecord.read(tmp_path) == replace(record, complete=not goes_on)


SHOWN = "JobId=8 ArrayJobId=7 ArrayTaskId=1 JobName=tuner JobState={state} Restarts={restarts} PreemptTime={preempted}"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `scontrol` was asked; it shows what stands in `shown` beside it. This process is the second start of 7_1."""
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {tmp_path}/shown\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_queue, "KILL_S", 0.0)
    for name, value in {"ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1", "JOB_ID": "8", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return tmp_path / "asked"


@pytest.mark.parametrize(
    ("state", "restarts", "preempted", "is_preempted", "requeues"),
    [
        ("RUNNING", 1, "2026-01-01T00:00:00", True, True),  # in its grace
        ("PENDING", 2, "None", True, False),  # somebody has requeued it
        ("RUNNING", 2, "2026-01-01T00:00:00", True, False),  # it has begun elsewhere, and would be stopped there
        ("RUNNING", 1, "None", False, None),  # its time is nearly up
        ("CANCELLED", 1, "None", False, None),
    ],
)
def test_a_job_queues_itself_again_only_where_slurm_has_not(
    state: str, restarts: int, preempted: str, is_preempted: bool, requeues: bool | None, asked: Path
) -> None:
    asked.with_name("shown").write_text(SHOWN.format(state=state, restarts=restarts, preempted=preempted) + "\n")
    assert slurm_queue.preempted_here() is is_preempted
    if is_preempted:
        with pytest.raises(JobDied, match="neither killed it nor started it again"):
            slurm_queue.start_again()
        assert ("requeue 7_1" in asked.read_text()) is requeues
