"""`-m`: grids here and in parallel processes, by the commands themselves."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweeper.__main__ import dispatch as sweeper

TINY = ["model=tiny", "train.num_samples=0", "train.val_every_steps=null"]
QUICK = [*TINY, "train.max_steps=4"]
LOCAL = ["hydra/launcher=local", "hydra.launcher.max_parallel=2"]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, shell_in: Callable[[Path], Any]) -> Any:
    return shell_in(tmp_path_factory.mktemp("sweeps"))


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def trials(folder: Path) -> dict[str, dict[str, Any]]:
    """The summaries of a sweep folder by trial id."""
    return {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/summary.json")}


def mlflow_runs(shell: Any, uri: str | None = None) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri or f"sqlite:///{shell.folder / 'mlflow.db'}")
    return list(client.search_runs([one.experiment_id for one in client.search_experiments()]))


def sweep_in_mlflow(shell: Any, folder: Path, uri: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The parent run of a sweep folder and its children by trial id."""
    runs = mlflow_runs(shell, uri)
    (parent,) = [run for run in runs if run.data.tags.get("tuner.sweep") == str(folder)]
    assert parent.info.run_id == json.loads((folder / "mlflow.json").read_text())["run_id"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    found = {run.data.tags["tuner.trial"]: run for run in children}
    assert len(found) == len(children)
    return parent, found


@pytest.mark.slow
def test_the_axes_of_the_readme(shell: Any) -> None:
    """Methods, ranks, alphas and optimizers, all 24 of them."""
    folder = shell.folder / "axes"
    axes = ["peft=lora,qlora", "peft.lora_rank=4,8,16", "peft.lora_alpha=16,32", "optimizer=adamw,paged_adamw8bit"]
    words = [*axes, "train.max_steps=2", "logger=none", f"hydra.sweep.dir={folder}"]
    done = shell.inside("-m", *TINY, *shell.data, *words)
    assert (done.code, done.err) == (0, "")
    points = {tuple(row[axis.partition("=")[0]] for axis in axes) for row in results(folder)}
    assert len(points) == len(results(folder)) == 24
    assert {row["status"] for row in results(folder)} == {"finished"}


@pytest.fixture(scope="module")
def here(shell: Any) -> tuple[Any, Path]:
    """A sweep in this process: two ranks, one of them twice, one too large, and two optimizers."""
    folder = shell.folder / "here"
    words = ["peft.lora_rank=4,8,4,400", "optimizer=adamw,sgd", f"hydra.sweep.dir={folder}"]
    return shell.inside("-m", *QUICK, *shell.data, *words), folder


def test_every_distinct_point_is_run_once_and_an_illegal_one_is_a_row(here: tuple[Any, Path]) -> None:
    done, folder = here
    rows = results(folder)
    assert done.code == 1  # two of the points that were asked for cannot be
    assert "2 of 6 trials did not finish" in done.err
    assert [row["status"] for row in rows] == ["finished"] * 4 + ["illegal"] * 2
    assert len(trials(folder)) == 4
    for row in rows[4:]:
        assert row["peft.lora_rank"] == "400"
        assert "peft.lora_rank=400: larger than the smallest side" in row["reason"]
        assert not (folder / row["trial"]).exists()


def test_the_table_is_sorted_and_says_what_the_summaries_say(here: tuple[Any, Path]) -> None:
    done, folder = here
    rows, summaries = results(folder)[:4], trials(folder)
    losses = [float(row["val_loss"]) for row in rows]
    assert losses == sorted(losses)
    for row in rows:
        summary = summaries[row["trial"]]
        for name in ("objective", "val_loss", "seconds", "peak_memory_mib", "trainable_params"):
            assert float(row[name]) == summary[name]
        config = yaml.safe_load((folder / row["trial"] / "config.yaml").read_text())
        assert str(config["peft"]["lora_rank"]) == row["peft.lora_rank"]
        assert config["optimizer"]["_target_"].split(".")[-1] == row["optimizer"]
        assert row["out"] == summary["out"] == str(folder / row["trial"])
    table = [line for line in done.out.splitlines() if line.startswith("│") and "finished" in line]
    assert [line.split()[1] for line in table] == [row["trial"] for row in rows]


@pytest.mark.slow
def test_the_printed_command_reproduces_the_best_trial_to_the_bit(shell: Any, here: tuple[Any, Path]) -> None:
    done, folder = here
    (line,) = [line for line in done.out.splitlines() if line.startswith("best ")]
    again = shell.line(f"{line.removeprefix('best').strip()} out=again logger=none")
    assert (again.code, again.err) == (0, "")
    summary = json.loads((shell.folder / "again" / "summary.json").read_text())
    assert summary["val_loss"] == float(results(folder)[0]["val_loss"])


def test_mlflow_has_one_parent_and_a_child_a_trial(shell: Any, here: tuple[Any, Path]) -> None:
    _, folder = here
    parent, children = sweep_in_mlflow(shell, folder)
    page = f"/#/experiments/{parent.info.experiment_id}/runs?workflowType=machine_learning"
    (line,) = [line for line in here[0].out.splitlines() if line.startswith("compare  mlflow ui ")]
    assert line.endswith(page)
    rows = {row["trial"]: row for row in results(folder)}
    assert parent.info.status == "FAILED"  # not every point finished
    assert parent.data.metrics["trials"] == 6
    assert parent.data.params["sweep.peft.lora_rank"] == "4,8,400"
    assert "objective" not in parent.data.metrics  # it is no trial
    assert set(children) == {trial for trial, row in rows.items() if row["status"] == "finished"}
    for trial, run in children.items():
        rank, optimizer = rows[trial]["peft.lora_rank"], rows[trial]["optimizer"]
        assert run.info.status == "FINISHED"
        assert run.info.run_name == f"lora_rank={rank} optimizer={optimizer}"
        assert (run.data.tags["peft.lora_rank"], run.data.tags["optimizer"]) == (rank, optimizer)
        assert (run.data.params["peft.lora_rank"], run.data.params["optimizer"]) == (rank, optimizer)
        assert not [key for key in run.data.params if key.startswith(("logger.tags", "logger.run_name"))]
        for name in ("val_loss", "objective", "seconds", "peak_memory_mib", "trainable_params"):
            assert math.isclose(run.data.metrics[name], float(rows[trial][name]))


def test_the_same_sweep_again_runs_nothing_and_says_the_same(shell: Any, here: tuple[Any, Path]) -> None:
    _, folder = here
    before = results(folder)
    words = ["peft.lora_rank=4,8", "optimizer=adamw,sgd", f"hydra.sweep.dir={folder}"]
    started = {file: file.stat().st_mtime_ns for file in folder.glob("*/summary.json")}
    done = shell.inside("-m", *QUICK, *shell.data, *words)
    assert (done.code, done.err) == (0, "")  # all four that are asked for now have finished
    assert "4 trials, 0 to run" in done.out
    assert results(folder) == before
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/summary.json")} == started


@pytest.mark.slow
def test_a_wider_grid_runs_what_is_new_and_all_runs_everything(shell: Any) -> None:
    folder = shell.folder / "wider"
    words = [*QUICK, *shell.data, "logger=none", f"hydra.sweep.dir={folder}"]
    assert shell.inside("-m", *words, "seed=0").code == 0
    wider = shell.inside("-m", *words, "seed=0,1")
    assert wider.code == 0
    assert "2 trials, 1 to run" in wider.out
    assert len(results(folder)) == 2
    started = {file: file.stat().st_mtime_ns for file in folder.glob("*/summary.json")}
    stopped = next(iter(started))  # also one that would only go on is begun anew
    stopped.write_text(stopped.read_text().replace('"finished"', '"stopped"'))
    (stopped.parent / "old").touch()
    assert "2 trials, 2 to run" in shell.inside("-m", *words, "seed=0,1", "sweep.rerun=all").out
    assert all(file.stat().st_mtime_ns > time_ns for file, time_ns in started.items())
    assert not (stopped.parent / "old").exists()


def test_a_sweep_of_one_point_is_a_sweep(shell: Any) -> None:
    done = shell.inside("-m", *QUICK, *shell.data, "logger=none", f"hydra.sweep.dir={shell.folder}/one")
    assert (done.code, done.err) == (0, "")
    assert len(results(shell.folder / "one")) == 1


BAD = {
    "peft.lora_rnk=4,8": "peft.lora_rnk=4,8: no such key; did you mean lora_rank",
    "optimzer=adamw,sgd": "optimzer=adamw,sgd: no such ",
    "peft.lora_rank=4,x": "peft.lora_rank=x: expected a whole number > 0",
    "peft.lora_rank=choice()": "peft.lora_rank=choice(): cannot be read as key=value",
    "peft.lora_rank=4,,8": "peft.lora_rank=4,,8: cannot be read as key=value",
    "optimizer=adamw,admw": "optimizer=admw: no such option; did you mean adamw",
    "optimizer.lr=interval(1e-4,1e-3)": "optimizer.lr=interval(1e-4,1e-3): a grid has no intervals",
    "hydra/launcher=locl": "hydra/launcher=locl: no such option; did you mean local?",
    "hydra/launcher=local hydra.launcher.max_paralel=2": "hydra.launcher.max_paralel=2: no such key; did you mean",
    "hydra/launcher=local hydra.launcher.max_parallel=0": "hydra.launcher.max_parallel=0: expected a whole number > 0",
    "hydra/launcher=local hydra.launcher.gpus=64": "hydra.launcher.gpus=64: this machine shows",
    "peft.lora_rank=4,400 sweep.on_illegal=refuse": "lora_rank=400: peft.lora_rank=400: larger than the smallest side",
    "sweep.rerun=some": "sweep.rerun=some: expected one of none, failed, all",
    "seed=0,1 out=there": "out=... together with --multirun",
    "seed=0,1 data.path=nowhere.jsonl": "data.path=nowhere.jsonl: does not exist (looked in ",
    "seed=0,1 data.path=nowhere.jsonl hydra/launcher=local": "data.path=nowhere.jsonl: does not exist (looked in ",
}


@pytest.mark.slow
@pytest.mark.parametrize("words", BAD)
def test_bad_words_are_one_clear_line_before_anything_is_written(words: str, shell: Any) -> None:
    folder = shell.folder / "bad"
    done = shell.inside("-m", *QUICK, *shell.data, f"hydra.sweep.dir={folder}", *words.split())
    assert done.code == 2
    assert done.err.startswith(f"error: {BAD[words]}")
    assert len(done.err.splitlines()) == 1
    assert not folder.exists()


@pytest.mark.slow
def test_a_key_that_only_some_points_have_makes_the_others_illegal(shell: Any) -> None:
    """An adapter's rank beside full training, which has none: whichever of the two is named first."""
    for order in ("lora,full", "full,lora"):
        folder = shell.folder / f"some {order}"
        words = [f"peft={order}", "peft.lora_rank=2,4", "logger=none", f"hydra.sweep.dir='{folder}'"]
        done = shell.inside("-m", *QUICK, *shell.data, *words)
        assert done.code == 1
        rows = results(folder)
        assert [(row["status"], row["peft"]) for row in rows] == [("finished", "lora")] * 2 + [("illegal", "full")] * 2
        assert all("no such key" in row["reason"] for row in rows[2:])


@pytest.mark.slow
def test_options_by_pattern(shell: Any) -> None:
    folder = shell.folder / "pattern"
    words = ["schedule=glob(co*)", "logger=none", f"hydra.sweep.dir={folder}"]
    assert shell.inside("-m", *QUICK, *shell.data, *words).code == 0
    assert {row["schedule"] for row in results(folder)} == {"constant", "cosine"}


def test_a_folder_that_cannot_be_made_is_one_clear_line(shell: Any) -> None:
    done = shell.inside("-m", *QUICK, *shell.data, "seed=0,1", "hydra.sweep.dir=/proc/sweep")
    assert done.code == 2
    assert done.err.startswith("error: hydra.sweep.dir=/proc/sweep: cannot be made: ")


def test_a_folder_that_cannot_be_written_is_one_clear_line(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shell.folder / "readable"
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)  # root may write everywhere
    done = shell.inside("-m", *QUICK, *shell.data, "seed=0,1", f"hydra.sweep.dir={folder}")
    assert (done.code, done.err) == (2, f"error: hydra.sweep.dir={folder}: no permission to write into it\n")
    assert not list(folder.iterdir())


def test_slurm_without_sbatch_is_one_clear_line(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    folder = shell.folder / "bad"
    done = shell.inside("-m", *QUICK, *shell.data, "seed=0,1", "hydra/launcher=slurm", f"hydra.sweep.dir={folder}")
    assert done.code == 2
    assert done.err.startswith("error: hydra/launcher=slurm: no sbatch on the PATH")
    assert not folder.exists()


def test_a_folder_with_another_objective_is_refused(shell: Any, here: tuple[Any, Path]) -> None:
    words = ["peft.lora_rank=4,8", "train.objective=seconds", f"hydra.sweep.dir={here[1]}"]
    done = shell.inside("-m", *QUICK, *shell.data, *words)
    assert done.code == 2
    assert "train.objective is val_loss, not seconds" in done.err


# Parallel processes


@pytest.fixture(scope="module")
def broken(shell: Any) -> tuple[Any, Path]:
    """A local sweep of which one trial has bad data and one is killed."""
    (shell.folder / "bad.jsonl").write_text("no JSON\n")
    folder = shell.folder / "broken"
    good = [word.removeprefix("data.path=") for word in shell.data if word.startswith("data.path=")]
    data = [word for word in shell.data if not word.startswith("data.path=")]
    words = [f"data.path={good[0]},bad.jsonl", "seed=0,1", f"hydra.sweep.dir={folder}", "train.max_steps=80"]
    process = shell.start("-m", *TINY, *data, *words, *LOCAL)
    victim = until(lambda: next(iter(folder.glob("*/metrics.jsonl")), None), process)
    os.kill(process_with_open(victim), signal.SIGKILL)
    return shell.end(process), folder


def until(found: Callable[[], Any], process: Any) -> Any:
    """Wait for something while the command runs."""
    deadline = time.monotonic() + 120
    while not (value := found()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def process_with_open(file: Path) -> int:
    """The process that writes a file."""
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if entry.resolve() == file.resolve():
                return int(entry.parts[2])
        except OSError:
            continue  # it has ended, or closed the file
    raise AssertionError(f"nobody writes {file}")


@pytest.mark.slow
def test_trials_that_fail_or_are_killed_cost_the_others_nothing(broken: tuple[Any, Path]) -> None:
    done, folder = broken
    rows = results(folder)
    assert done.code == 1
    assert [row["status"] for row in rows] == ["finished"] + ["failed"] * 3
    assert "3 of 4 trials did not finish" in done.err
    reasons = [row["reason"] for row in rows if row["status"] == "failed"]
    assert sorted("not valid JSON" in reason for reason in reasons) == [False, True, True]
    assert "killed, it left no result" in reasons


@pytest.mark.slow
def test_the_log_of_a_failed_trial_is_named_and_holds_what_it_printed(
    broken: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    done, folder = broken
    sweeper(["status", str(folder)])
    for out in (done.out, capsys.readouterr().out):  # of the sweep, and of whoever asks later
        logs = [Path(line.split("log ", 1)[1]) for line in out.splitlines() if line.strip().startswith("log ")]
        assert all(log.exists() for log in logs)
        assert sum("not valid JSON" in log.read_text() for log in logs) == 2
        assert sum(log.name == "process.log" for log in logs) == 3


@pytest.mark.slow
def test_mlflow_has_the_true_status_of_trials_that_could_not_tell_it(shell: Any, broken: tuple[Any, Path]) -> None:
    _, folder = broken
    parent, children = sweep_in_mlflow(shell, folder)
    assert parent.info.status == "FAILED"
    assert sorted(run.info.status for run in children.values()) == ["FAILED"] * 3 + ["FINISHED"]
    assert sum("not valid JSON" in run.data.tags.get("reason", "") for run in children.values()) == 2
    configs = [yaml.safe_load(file.read_text()) for file in folder.glob("*/config.yaml")]
    assert {config["logger"]["live"] for config in configs} == {False}  # a SQLite file has one writer, the sweep


@pytest.mark.slow
def test_a_process_prints_the_command_that_runs_its_trial_alone(
    shell: Any, broken: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = broken
    (killed,) = [row for row in results(folder) if "killed" in row["reason"]]
    printed = "".join(file.read_text() for file in folder.glob(".submitit/*/*/*_log.out"))
    command = f"python -m sweeper trial {folder / killed['trial']}"
    assert command in printed
    (folder / killed["trial"] / "summary.json").unlink()
    alone = shell.line(command)
    assert alone.code == 0, alone.err
    assert trials(folder)[killed["trial"]]["status"] == "finished"
    sweeper(["status", str(folder)])
    assert capsys.readouterr().out.count("finished") == 2


@pytest.mark.slow
def test_failed_trials_are_run_again_where_that_is_asked(shell: Any, broken: tuple[Any, Path]) -> None:
    _, folder = broken
    good = next(word.removeprefix("data.path=") for word in shell.data if word.startswith("data.path="))
    (shell.folder / "bad.jsonl").write_text(Path(good).read_text())
    data = [word for word in shell.data if not word.startswith("data.path=")]
    words = [f"data.path={good},bad.jsonl", "seed=0,1", f"hydra.sweep.dir={folder}", "train.max_steps=80"]
    done = shell.inside("-m", *TINY, *data, *words, *LOCAL, "sweep.rerun=failed")
    assert done.code == 0, done.err
    assert "4 trials, 2 to run" in done.out
    parent, children = sweep_in_mlflow(shell, folder)
    assert parent.info.status == "FINISHED"
    assert [run.info.status for run in children.values()] == ["FINISHED"] * 4


@pytest.fixture(scope="module")
def edited(shell: Any) -> tuple[Any, Any, Path]:
    """A local sweep of three trials, two at once, without a store; the same command again, and an edit, as they wait.

    Returns:
        How it ended, how the same command ended meanwhile, and its folder.
    """
    from tuner.config import conf_dir

    mine = shell.folder / "mine" / "optimizer"
    mine.mkdir(parents=True)
    (mine / "edited.yaml").write_text((conf_dir() / "optimizer" / "adamw.yaml").read_text())
    folder = shell.folder / "frozen"
    words = ["optimizer=edited", "seed=0,1,2", "logger.tracking_uri=sqlite:////proc/mlflow.db"]
    command = ["--config-dir=mine", "-m", *QUICK, *shell.data, *words, f"hydra.sweep.dir={folder}", *LOCAL]
    process = shell.start(*command)
    until(lambda: len(list(folder.glob("*/config.yaml"))) == 3, process)
    second = shell.inside(*command)
    (mine / "edited.yaml").write_text("# broken\n_target_: tuner.optimizers.nothing.nothing\n")
    assert not list(folder.glob("*/summary.json"))
    return shell.end(process), second, folder


@pytest.mark.slow
def test_a_queued_trial_is_frozen_and_the_cpus_are_shared_out(edited: tuple[Any, Any, Path]) -> None:
    """What is edited after the submission changes no trial; two at once have half of the threads each."""
    from tuner.config import available_cpus

    done, _, folder = edited
    assert done.code == 0, done.err
    configs = [yaml.safe_load(file.read_text()) for file in folder.glob("*/config.yaml")]
    assert {config["optimizer"]["_target_"] for config in configs} == {"tuner.optimizers.adamw.adamw"}
    assert {config["train"]["num_threads"] for config in configs} == {max(1, available_cpus() // 2)}


@pytest.mark.slow
def test_a_store_that_cannot_be_used_is_said_and_stops_no_trial(edited: tuple[Any, Any, Path]) -> None:
    done, _, folder = edited
    assert "warning: MLflow: the store sqlite:////proc/mlflow.db cannot be used" in done.out
    assert [row["status"] for row in results(folder)] == ["finished"] * 3


@pytest.mark.slow
def test_a_second_sweep_in_the_same_folder_is_refused(edited: tuple[Any, Any, Path]) -> None:
    _, second, _ = edited
    assert second.code == 2
    assert "another sweep is running in it" in second.err


@pytest.mark.slow
def test_ctrl_c_saves_every_trial_and_the_printed_command_goes_on(shell: Any) -> None:
    folder = shell.folder / "stopped"
    words = ["seed=0,1,2", "logger=none", f"hydra.sweep.dir={folder}", *LOCAL, "train.max_steps=150"]
    process = shell.start("-m", *TINY, *shell.data, *words)
    until(lambda: len(list(folder.glob("*/metrics.jsonl"))) == 2, process)
    process.send_signal(signal.SIGINT)
    done = shell.end(process)
    assert done.code == 130, done.err
    assert sorted(row["status"] for row in results(folder)) == ["pending", "stopped", "stopped"]
    assert all("checkpoints" in summary["reason"] for summary in trials(folder).values())
    (command,) = [line.split(": ", 1)[1] for line in done.err.splitlines() if line.startswith("continue: ")]
    again = shell.line(command)
    assert again.code == 0, again.err
    assert [row["status"] for row in results(folder)] == ["finished"] * 3
    assert "resumed at step" in "".join(file.read_text() for file in folder.glob("*/run.log"))


@pytest.fixture
def server(tmp_path: Path, shell: Any) -> Iterator[str]:
    """A real tracking server."""
    import socket
    import subprocess
    import sys

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/store.db",
        "--artifacts-destination",
        str(tmp_path / "files"),
    ]
    # Without it the server starts eight processes more, for evaluations of its own.
    env = {**shell.env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *store], stdout=log, stderr=log, env=env, cwd=tmp_path, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # told to end, it would wait for the connections of this process
        process.wait(30)


@pytest.mark.slow
def test_trials_write_to_a_tracking_server_themselves(shell: Any, server: str) -> None:
    folder = shell.folder / "served"
    words = ["seed=0,1", f"hydra.sweep.dir={folder}", *LOCAL]
    done = shell.inside("-m", *QUICK, *shell.data, *words, MLFLOW_TRACKING_URI=server)
    assert done.code == 0, done.err
    configs = [yaml.safe_load(file.read_text()) for file in folder.glob("*/config.yaml")]
    assert {(config["logger"]["tracking_uri"], config["logger"]["live"]) for config in configs} == {(server, True)}
    parent, children = sweep_in_mlflow(shell, folder, server)
    assert [run.info.status for run in (parent, *children.values())] == ["FINISHED"] * 3
