"""The cluster that the other tests of this folder stand on does what clusters do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError

SCRIPT = Path(__file__).with_name("cluster.py")

pytestmark = pytest.mark.usefixtures("slurm")


def ask(cluster: Cluster, *command: str) -> str:
    """What the command prints."""
    return subprocess.run(
        command, env=os.environ | cluster.environment(), check=True, capture_output=True, text=True
    ).stdout.strip()


def submit(cluster: Cluster, out: Path, *words: str, script: str = "sleep 300") -> str:
    """The job's id. The script's output is added to `out`, when the job starts again too."""
    return ask(cluster, "sbatch", "--parsable", f"--output={out}", "--open-mode=append", *words, "--wrap", script)


def state(cluster: Cluster, job: str) -> str:
    return ask(cluster, "squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.1)


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def processes(folder: Path) -> list[str]:
    """Those which have a path below the folder in their environment or their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            about = process.joinpath("cmdline").read_bytes() + process.joinpath("environ").read_bytes()
        except OSError:
            continue
        if f"{folder}/".encode() in about and int(process.name) != os.getpid():
            found.append(f"{process.name} {about.decode(errors='replace')}")
    return found


@dataclass(frozen=True)
class Waiting:
    """Jobs whose end takes SLURM half a minute, submitted before the first test and looked at by the last ones."""

    out_of_time: str
    preempted: str
    preempted_out: Path


@pytest.fixture(scope="module", autouse=True)
def waiting(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Waiting:
    folder = tmp_path_factory.mktemp("waiting")
    on_node3 = ("--nodelist=node3", "--cpus-per-task=3")
    out_of_time = submit(cluster, folder / "out_of_time", "--nodelist=node3", "--time=1", script="srun sleep 300")
    preempted = submit(cluster, folder / "preempted", *on_node3, script="echo start; sleep 300")
    wait_until(lambda: (state(cluster, out_of_time), text(folder / "preempted")) == ("RUNNING", "start\n"))
    cluster.exhaust_time(out_of_time)
    submit(cluster, folder / "high", *on_node3, "--partition=high", script="true")
    return Waiting(out_of_time, preempted, folder / "preempted")


def test_the_nodes_and_partitions_are_there(cluster: Cluster) -> None:
    assert set(ask(cluster, "sinfo", "-h", "-N", "-o", "%N %R %c %m %G").splitlines()) == {
        f"node{number} {partition} 4 4000 gpu:2" for number in (1, 2, 3) for partition in ("main", "high")
    }


def test_an_array_runs_and_writes_its_output(cluster: Cluster, tmp_path: Path) -> None:
    script = "echo $SLURM_ARRAY_TASK_ID on $SLURMD_NODENAME"
    submit(cluster, tmp_path / "%a.out", "--array=0-3%2", "--wait", script=script)
    printed = [text(tmp_path / f"{task}.out").split() for task in range(4)]
    assert [words[0] for words in printed] == ["0", "1", "2", "3"]
    assert {words[2] for words in printed} <= {"node1", "node2", "node3"}


def test_two_jobs_on_a_node_get_a_gpu_each(cluster: Cluster, tmp_path: Path) -> None:
    words = ("--nodelist=node1", "--gres=gpu:1", "--array=0-1")
    submit(cluster, tmp_path / "%a.out", *words, script="echo GPU $CUDA_VISIBLE_DEVICES; sleep 2")
    wait_until(lambda: {text(tmp_path / f"{task}.out") for task in range(2)} == {"GPU 0\n", "GPU 1\n"})


def test_there_is_no_accounting(cluster: Cluster) -> None:
    done = subprocess.run(["sacct"], env=os.environ | cluster.environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, "Slurm accounting storage is disabled")


def test_a_job_makes_room_for_one_in_high_and_starts_again(cluster: Cluster, tmp_path: Path) -> None:
    whole_node = ("--exclusive", "--nodelist=node2")
    # It asks to be queued again when it is told. SLURM itself takes its end for an end, or kills it after the grace.
    on_signal = "echo told; scontrol requeue $SLURM_JOB_ID; exit"
    script = f"srun bash -c 'trap \"{on_signal}\" TERM; echo start ${{SLURM_RESTART_COUNT:-0}}; sleep 300 & wait'"
    job = submit(cluster, tmp_path / "low", *whole_node, script=script)
    wait_until(lambda: text(tmp_path / "low") == "start 0\n")
    submit(cluster, tmp_path / "high", *whole_node, "--partition=high", script="echo $SLURM_JOB_PARTITION")
    wait_until(lambda: text(tmp_path / "high") == "high\n")
    wait_until(lambda: "start 1\n" in text(tmp_path / "low"), timeout_s=20)
    assert "told\n" in text(tmp_path / "low")
    assert "Restarts=1 " in ask(cluster, "scontrol", "show", "job", job)
    ask(cluster, "scancel", job)


def test_a_killed_node_and_a_stop_leave_no_process(tmp_path: Path) -> None:
    with Cluster(tmp_path / "cluster", nodes=2, gpus=0) as cluster:
        job = submit(cluster, tmp_path / "out", "--nodes=2", script="srun bash -c 'echo $$; trap : TERM; sleep 300'")
        wait_until(lambda: len(text(tmp_path / "out").split()) == 2)
        assert len(processes(cluster.folder)) > 8
        on_both = processes(cluster.folder)
        cluster.kill_node("node2")
        assert not [
            line for line in processes(cluster.folder) if "SLURMD_NODENAME=node2" in line or "-N\0node2" in line
        ]
        assert [line for line in on_both if "SLURMD_NODENAME=node2" in line]
        assert [line for line in processes(cluster.folder) if "SLURMD_NODENAME=node1" in line], "the other node's job"
        assert state(cluster, job) == "RUNNING", "nobody has told the controller"
        with pytest.raises(ClusterError, match="node2 is not running; running: node1"):
            cluster.kill_node("node2")
    assert processes(cluster.folder) == []


def test_two_clusters_do_not_know_of_each_other(cluster: Cluster, tmp_path: Path) -> None:
    with Cluster(tmp_path / "other", nodes=1) as other:
        submit(other, tmp_path / "out", "--wait", script="echo here")
        assert text(tmp_path / "out") == "here\n"
        assert len(ask(other, "sinfo", "-h", "-N", "-p", "main").splitlines()) == 1
        assert len(ask(cluster, "sinfo", "-h", "-N", "-p", "main").splitlines()) == 3
    assert len(ask(cluster, "sinfo", "-h", "-N", "-p", "main").splitlines()) == 3


def test_a_start_clears_what_a_killed_process_has_left(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    program = "from tests.slurm.cluster import *; Cluster(Path(sys.argv[1]), nodes=2).start(); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=SCRIPT.parents[2])
    assert killed.returncode == -signal.SIGKILL
    left = {line.split()[0] for line in processes(folder)}
    assert len(left) >= 4, "munged, slurmctld and two of slurmd"
    with Cluster(folder, nodes=1) as cluster:
        assert len(ask(cluster, "sinfo", "-h", "-N", "-p", "main").splitlines()) == 1
        assert not left & {line.split()[0] for line in processes(folder)}
    assert processes(folder) == []


def test_a_cluster_that_does_not_come_up_shows_its_logs(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"slurmctld.* ended while(?s:.)*SlurmctldDbug"):
        Cluster(tmp_path / "cluster", extra="SlurmctldDbug=info").start()
    assert processes(tmp_path) == []


def test_a_path_that_is_too_long_for_sockets_is_an_error_and_no_job_that_waits_for_good(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 60)
    with pytest.raises(ClusterError, match="bytes too long for the daemons' sockets"):
        Cluster(folder).start()
    assert not folder.exists()


def run_script(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--nodes", "2", *words],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_the_command_line_runs_a_command_and_cleans_up(tmp_path: Path) -> None:
    run = run_script(tmp_path, "--gpus", "1", "--", "sh", "-c", "sinfo -h -N -p main -o %N-%G; exit 7")
    out, _ = run.communicate()
    assert (run.returncode, out.split()) == (7, ["node1-gpu:1", "node2-gpu:1"])
    assert (list(tmp_path.iterdir()), processes(tmp_path)) == ([], [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_line_cleans_up_on_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    run = run_script(tmp_path, "--", "sh", "-c", 'sbatch -o /dev/null --wrap "sleep 300"; exec tail -f /dev/null')
    wait_until(lambda: any(" tail\0" in line for line in processes(tmp_path)))
    if number == signal.SIGINT:  # as a terminal does, to the command too
        os.killpg(run.pid, number)
    else:
        run.send_signal(number)
    assert run.wait(30) == 128 + number
    assert (list(tmp_path.iterdir()), processes(tmp_path)) == ([], [])


def test_a_job_that_was_not_told_is_preempted_after_the_grace(cluster: Cluster, waiting: Waiting) -> None:
    """SIGTERM reaches what srun has started, and this job has started nothing with it."""
    wait_until(lambda: text(waiting.preempted_out).count("start\n") == 2, timeout_s=45)
    assert "DUE TO PREEMPTION" in text(waiting.preempted_out)
    ask(cluster, "scancel", waiting.preempted)


def test_a_job_over_its_time_limit_ends_in_timeout(cluster: Cluster, waiting: Waiting) -> None:
    wait_until(lambda: state(cluster, waiting.out_of_time) == "TIMEOUT", timeout_s=45)
    assert "JobState=TIMEOUT Reason=TimeLimit" in ask(cluster, "scontrol", "show", "job", waiting.out_of_time)
