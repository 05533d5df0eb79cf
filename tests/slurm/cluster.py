"""A real SLURM cluster of this machine's own: started for a test or one command, and gone afterwards.

    python tests/slurm/cluster.py [--nodes N] [--gpus N] -- sbatch --wait --wrap hostname

runs the command on a fresh cluster and exits with the command's exit code. In Python it is a context manager:

    with Cluster(folder) as cluster:
        subprocess.run(["sbatch", "--partition=high", ...], env=os.environ | cluster.environment())

It needs root and Debian's packages `slurm-wlm` and `munge`, no systemd and no accounting database: `sacct` fails, as
on many small clusters. Everything lives in one folder (configuration, keys, sockets, logs, jobs' state), so several
clusters can run at once, and one that its process left behind is recognised and cleared by the next start there.

All nodes are daemons on one host: `hostname` is the same on each of them, and SLURMD_NODENAME tells them apart.
The alternative, a container per node, comes closer to a real cluster, but needs a container engine wherever tests run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import TracebackType

FOLDERS = ("etc", "run", "log", "dev", "spool", "state")
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
LONGEST_SOCKET = 107
"""Bytes of a Unix socket's path (sun_path, unix(7)), without the byte that ends it."""

# What is not obvious here, times as measured with SLURM 22.05:
# - cred_expire: a job that was requeued waits until the credential of its first start has expired, 120 s by default.
# - GraceTime: a job that is preempted gets SIGTERM in its steps (what srun started), not in its batch script, and may
#   go on so long. The controller looks every few seconds only: a grace of 3 s lasted 5 to 13 s, and so did one of 10 s.
# - KillWait: from SIGTERM to SIGKILL at scancel, at the time limit and after the grace; 2 s lasted 4.6 s, and a job
#   that had to be killed was COMPLETING for 7.4 s.
# - SlurmctldParameters=preempt_send_user_signal is not set, as by default: with it a job that was submitted with
#   --signal=USR2@90 gets USR2 instead of SIGTERM as its grace begins.
# - MinJobAge: how long SLURM remembers a job that has ended. By default 300 s, after which nothing tells of it.
# - SelectType: cores, memory and GPUs are handed out; without it a job takes whole nodes.
# - config_overrides: nodes have the size that is said here, whatever the host has.
CONFIGURATION = """\
ClusterName=cluster
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
SlurmctldTimeout=30
SlurmdTimeout={slurmd_timeout_s}
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=0,sched_min_interval=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=2
CompleteWait=0
MinJobAge=86400
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=high Nodes=ALL Default=NO State=UP PriorityTier=10 PreemptMode=OFF
{extra}
"""


class ClusterError(Exception):
    """The cluster cannot run here, or did not come up; says why, with the last lines of the daemons' logs."""


def missing() -> str | None:
    """Why no cluster can be started on this machine, or None if one can."""
    programs = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if program(name) is None]
    if programs:
        return f"{', '.join(programs)} not found: apt-get install --no-install-recommends slurm-wlm munge"
    if os.geteuid() != 0:
        return "the daemons of SLURM need root"
    return None


def program(name: str) -> str | None:
    """Path of a daemon's program; a user's PATH often lacks /usr/sbin."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


class Cluster:
    """A private SLURM cluster on localhost with the nodes `node1`, `node2`, ... and two partitions.

    Jobs in `main`, the default, make room for those in `high`: what srun started in them gets SIGTERM. A job that then
    ends by itself has ended, whatever its exit code; one that still runs after the grace is killed and queued again.

    Args:
        folder: the cluster's own; made if it is not there, kept by `stop`.
        nodes, cpus, memory_mib, gpus: nodes, and what each of them has. The GPUs are made up (links to /dev/null):
            SLURM hands them out and sets CUDA_VISIBLE_DEVICES.
        port: the first of `nodes + 1` TCP ports on 127.0.0.1; None searches for a free range.
        grace_s: how long a job goes on, at the least, after it was told that it is preempted.
        slurmd_timeout_s: how long a node may not answer until it is taken for crashed; the controller looks rarely, so
            that 10 s lasted 29 s and 20 s lasted 37 s.
        extra: further lines of slurm.conf.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 3,
        cpus: int = 4,
        memory_mib: int = 4000,
        gpus: int = 2,
        port: int | None = None,
        grace_s: int = 3,
        slurmd_timeout_s: int = 20,
        extra: str = "",
    ) -> None:
        self.folder = folder.absolute()
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.cpus = cpus
        self.memory_mib = memory_mib
        self.gpus = gpus
        self.port = port
        self.grace_s = grace_s
        self.slurmd_timeout_s = slurmd_timeout_s
        self.extra = extra
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def environment(self) -> dict[str, str]:
        """What a command needs in its environment to talk to this cluster rather than to another one."""
        return {"SLURM_CONF": str(self._conf)}

    def start(self) -> None:
        """Bring the cluster up; returns when all nodes take jobs, after 1 to 2 s.

        Raises:
            ClusterError: SLURM is not installed, the user is not root, the folder's path is too long for sockets, or a
                daemon ended or did not answer in time.
        """
        reason = missing() or self._too_long()
        if reason:
            raise ClusterError(reason)
        self.stop()  # what a process that was killed has left here
        try:
            self._write_files()
            _resolve(self.nodes)
            self._start_daemons()
            self._wait_for_nodes()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all processes of this cluster and its jobs, nobody else's; returns when none is left.

        By SIGKILL: nothing is worth saving, and asked to end, daemons wait for jobs that may ignore their signals.
        """
        _kill([self._pid(name) for name in self._started() if self._alive(name)])  # from here on no job starts
        self._kill_jobs()
        for name in self._started():
            self._forget(name)

    def kill_node(self, name: str) -> None:
        """A node's crash: SIGKILL to its daemon, its jobs' keepers (slurmstepd) and its jobs, to nothing else.

        The controller is not told. It requeues the node's jobs when it misses the node, after `slurmd_timeout_s`, or
        at once on `lose_node`.
        """
        self._require_node(name)
        # Keepers first, or one of them would have told the controller that its job has failed.
        _kill([self._pid(name), *sorted(self._job_processes(name), key=lambda pid: _name(pid) not in KEEPERS)])
        self._kill_jobs(name)
        self._forget(name)

    def lose_node(self, name: str) -> None:
        """A node that the controller can no longer reach: it requeues the node's jobs, which go on where they are.

        The node's daemon is killed and the controller told that it is gone.
        """
        self._require_node(name)
        _kill([self._pid(name)])
        self._forget(name)
        command = ["scontrol", "update", f"nodename={name}", "state=down", "reason=lost"]
        subprocess.run(command, env=self._clean_environment(), check=True)

    def _require_node(self, name: str) -> None:
        if not self._alive(name):
            nodes = [other for other in self._started() if other not in ("munged", "slurmctld")]
            raise ClusterError(f"{name} is not running; running: {', '.join(nodes)}")

    def exhaust_time(self, job: str) -> None:
        """Let a running job's time be over. SLURM looks every 30 s; the shortest limit it takes itself is a minute."""
        command = ["scontrol", "update", f"jobid={job}", "endtime=now+1"]
        subprocess.run(command, env=self._clean_environment(), check=True)

    # -- files

    @property
    def _conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    def _write_files(self) -> None:
        for name in FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)  # a cluster begins with no jobs and no nodes
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # munged refuses a socket below a folder that others cannot enter
        key = self.folder / "etc" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        port = free_ports(len(self.nodes) + 1) if self.port is None else self.port
        host = socket.gethostname().split(".")[0]
        size = f"CPUs={self.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={self.cpus} RealMemory={self.memory_mib}"
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + number} {size}{gres}"
            for number, name in enumerate(self.nodes, start=1)
        )
        text = CONFIGURATION.format(
            host=host,
            port=port,
            folder=self.folder,
            nodes=nodes,
            grace_s=self.grace_s,
            slurmd_timeout_s=self.slurmd_timeout_s,
            extra=self.extra,
        )
        self._conf.write_text(text)
        self._conf.with_name("cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._write_gpus()

    def _write_gpus(self) -> None:
        """SLURM takes only character devices for GPUs; links to /dev/null are."""
        lines = ["AutoDetect=off"]
        for number in range(self.gpus):
            device = self.folder / "dev" / f"gpu{number}"
            device.symlink_to(os.devnull)
            lines += [f"NodeName={node} Name=gpu File={device}" for node in self.nodes]
        self._conf.with_name("gres.conf").write_text("\n".join(lines) + "\n")

    # -- daemons

    def _start_daemons(self) -> None:
        etc, run, log = (self.folder / name for name in ("etc", "run", "log"))
        socket_path = run / "munge.socket"
        self._launch(
            "munged",
            "munged",
            "--foreground",
            "--force",
            *(f"--key-file={etc}/munge.key", f"--seed-file={etc}/munge.seed", f"--log-file={log}/munged.log"),
            *(f"--socket={socket_path}", f"--pid-file={run}/munged.pid"),
        )
        self._wait(socket_path.exists, "munged opened no socket")
        self._launch("slurmctld", "slurmctld", "-D", "-f", str(self._conf))
        for node in self.nodes:
            (self.folder / "spool" / node).mkdir(exist_ok=True)
            self._launch(node, "slurmd", "-D", "-f", str(self._conf), "-N", node)

    def _launch(self, name: str, daemon: str, *arguments: str) -> None:
        """Start a daemon in the foreground, so that its end is seen at once, but in a session that Ctrl-C spares."""
        executable = program(daemon)
        assert executable is not None, "missing() has looked"
        with (self.folder / "log" / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                [executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._clean_environment(),
                cwd=self.folder,
                start_new_session=True,
            )
        self._daemons[name] = process
        # The daemon writes the same number here itself, later: too late if this process is killed before.
        (self.folder / "run" / f"{name}.pid").write_text(f"{process.pid}\n")

    def _clean_environment(self) -> dict[str, str]:
        """Without the variables of a SLURM job that this process may be: they would tell `scancel` and others lies."""
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        return outside | self.environment()

    def _wait_for_nodes(self) -> None:
        def ready() -> bool:
            states = self._ask("sinfo", "--noheader", "--partition=main", "--Node", "--format=%T").split()
            return states == ["idle"] * len(self.nodes)

        self._wait(ready, "the nodes are not ready")

    def _ask(self, *command: str) -> str:
        """What a command of SLURM prints; empty if the controller does not answer (yet)."""
        try:
            done = subprocess.run(command, env=self._clean_environment(), capture_output=True, text=True, timeout=5)
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout

    def _wait(self, condition: Callable[[], bool], complaint: str) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        while not condition():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended:
                raise ClusterError(f"{', '.join(ended)} ended while the cluster started\n{self._last_lines()}")
            if time.monotonic() > end:
                raise ClusterError(f"{complaint} after {START_TIMEOUT_S:.0f} s\n{self._last_lines()}")
            time.sleep(POLL_S)

    def _last_lines(self) -> str:
        parts = []
        for path in sorted((self.folder / "log").iterdir()):
            lines = path.read_text(errors="replace").splitlines()[-10:]
            if lines:
                parts.append("\n".join([f"--- {path}", *lines]))
        return "\n".join(parts)

    # -- which processes are the cluster's

    def _started(self) -> list[str]:
        """Daemons, from their files and not from this object: another process may have started them."""
        return sorted(path.stem for path in (self.folder / "run").glob("*.pid"))

    def _forget(self, name: str) -> None:
        if name in self._daemons:
            self._daemons.pop(name).wait()
        (self.folder / "run" / f"{name}.pid").unlink(missing_ok=True)

    def _pid(self, name: str) -> int:
        """0 if there is no such daemon."""
        try:
            return int((self.folder / "run" / f"{name}.pid").read_text() or 0)
        except FileNotFoundError:
            return 0

    def _alive(self, name: str) -> bool:
        """A number in a file may since have gone to a stranger: a daemon of this cluster has its configuration."""
        pid = self._pid(name)
        return pid > 0 and _running(pid) and self._is_mine(pid)

    def _is_mine(self, pid: int, *variables: str) -> bool:
        environment = _environment(pid)
        return all(wanted.encode() in environment for wanted in (f"SLURM_CONF={self._conf}", *variables))

    def _too_long(self) -> str | None:
        """What is wrong with the folder's path: a step's socket does not fit, and its job would be held for good."""
        name = self.nodes[-1]
        socket_of_step = f"{self.folder}/spool/{name}/{name}_99999.4294967291"
        excess = len(os.fsencode(socket_of_step)) - LONGEST_SOCKET
        return f"{self.folder}: {excess} bytes too long for the daemons' sockets" if excess > 0 else None

    def _kill_jobs(self, node: str | None = None) -> None:
        """SIGKILL until none is left: a process may have started another while those were sought that are killed."""
        end = time.monotonic() + STOP_TIMEOUT_S
        while left := self._job_processes(node):
            _kill(left)
            if time.monotonic() > end:
                raise ClusterError(f"processes {sorted(left)} of {self.folder} come back")

    def _job_processes(self, node: str | None = None) -> set[int]:
        """Jobs (on that node), what they have started, and their keepers; not commands that talk to the cluster."""
        everyone = _processes()
        mine = [pid for pid in everyone if self._is_mine(pid)]
        if node is None:
            roots = {pid for pid in mine if _name(pid) in KEEPERS or _in_a_job(pid)}
        else:
            # A keeper does not have its node's name, but its job has.
            jobs = [pid for pid in mine if self._is_mine(pid, f"SLURMD_NODENAME={node}")]
            roots = {*jobs, *(_parent(pid) for pid in jobs if _name(_parent(pid)) in KEEPERS)}
        parents = {pid: _parent(pid) for pid in everyone}
        while children := {pid for pid, parent in parents.items() if parent in roots and pid not in roots}:
            roots |= children
        return {pid for pid in roots if _running(pid)}


# -- processes, as /proc tells of them; one that has just ended is no error

KEEPERS = ("slurmstepd", "slurmscriptd")


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _environment(pid: int) -> list[bytes]:
    """What the process was started with."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _stat(pid: int) -> tuple[str, str, int]:
    """Name, state and parent; `X` is the state of a process that is no more."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return "", "X", 0
    name, rest = text.split("(", 1)[1].rsplit(")", 1)
    state, parent = rest.split()[:2]
    return name, state, int(parent)


def _name(pid: int) -> str:
    return _stat(pid)[0]


def _running(pid: int) -> bool:
    """A zombie runs no more; its parent, which may be slow, is not this module's affair."""
    return _stat(pid)[1] not in "XZ"


def _parent(pid: int) -> int:
    return _stat(pid)[2]


def _in_a_job(pid: int) -> bool:
    return any(variable.startswith(b"SLURM_JOB_ID=") for variable in _environment(pid))


def _kill(pids: Collection[int]) -> None:
    """SIGKILL in this order; returns when all have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + STOP_TIMEOUT_S
    while any(_running(pid) for pid in pids):
        if time.monotonic() > end:
            raise ClusterError(f"processes {sorted(pids)} did not end on SIGKILL within {STOP_TIMEOUT_S:.0f} s")
        time.sleep(0.01)


# -- the host


def free_ports(count: int) -> int:
    """First of `count` neighbouring TCP ports which nobody uses, below those that Linux gives to clients (32768 up)."""
    for _ in range(100):
        first = random.randrange(20000, 32768 - count)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise ClusterError(f"no {count} neighbouring free ports found in 100 attempts")


def _resolve(nodes: Iterable[str]) -> None:
    """Nodes' names must lead somewhere: torch.distributed connects to the first node of a job by its name.

    The entries stay in /etc/hosts, for another cluster may have come to rely on them.
    """
    for node in nodes:
        try:
            address = socket.gethostbyname(node)
        except OSError:
            with Path("/etc/hosts").open("a") as hosts:
                hosts.write(f"127.0.0.1 {node}\n")
            continue
        if not address.startswith("127."):
            raise ClusterError(f"{node} is another machine's name here ({address}); its name must lead to 127.0.0.1")


# -- the command line


def main(arguments: list[str] | None = None) -> int:
    """Run a command on a fresh cluster. Returns its exit code, 128 + N if signal N ended it."""
    parser = argparse.ArgumentParser(description="Run a command on a SLURM cluster that lives as long as the command.")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=4, help="of each node")
    parser.add_argument("--gpus", type=int, default=2, help="of each node, made up")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="and its arguments, after --")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As Ctrl-C does: leave through the `with` below, which takes the cluster down.
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        with (
            tempfile.TemporaryDirectory(prefix="slurm-") as folder,
            Cluster(Path(folder), nodes=options.nodes, cpus=options.cpus, gpus=options.gpus) as cluster,
        ):
            return _run(options.command, os.environ | cluster.environment())
    except ClusterError as error:
        print(f"cluster.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(command: list[str], environment: dict[str, str]) -> int:
    """From here on signals are only noted: exceptions could lose the exit code, or break off the end of the cluster."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        child = subprocess.Popen(command, env=environment)
    except OSError as error:
        print(f"cluster.py: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    while child.poll() is None and not received:
        time.sleep(POLL_S)
    if received:
        _end_child(child, told=received[0] == signal.SIGINT)
    code = child.wait()
    return 128 - code if code < 0 else code


def _end_child(child: subprocess.Popen[bytes], told: bool) -> None:
    """A terminal sends Ctrl-C to the command too; other signals came to this process alone."""
    if not told:
        child.terminate()
    try:
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()


if __name__ == "__main__":
    sys.exit(main())
