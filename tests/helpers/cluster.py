"""A real SLURM cluster on this one machine: slurmctld, and nodes that are slurmd in namespaces of their own.

A node has its own host name, loopback address, process table and /dev/shm, and eight fake GPUs (null devices); the
file system is shared, as on a cluster. Killing a node's first process is a power failure. Needs root and Debian's
slurm-wlm and munge; `missing()` says what this machine lacks. Imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CPUS, MEMORY_MIB, GPUS = 64, 1_000_000, 8
PROGRAMS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "munged": "munge",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "nsenter": "util-linux",
}
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"
# Started by the tests or by slurmctld, which gives it an empty environment. bash is the node's init: it reaps orphans.
# `alive` is a pipe that only the tests' process writes to: its end, however it comes, is the end of the node.
# -b: the node has just booted; the machine's uptime would tell slurmctld otherwise.
_BOOT = """#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin SLURM_CONF={folder}/slurm.conf
for node; do
    mkdir -p {folder}/spool/$node/tmp
    setsid unshare --mount --uts --pid --ipc --fork --kill-child --mount-proc bash -c '
        hostname "$1"; mount --bind {folder}/hosts /etc/hosts; mount -t tmpfs none /dev/shm
        slurmd -b -D -N "$1" & slurmd=$!
        { read -r _ <{folder}/alive; kill -KILL $slurmd; } &
        wait $slurmd' boot "$node" </dev/null >{folder}/log/$node.out 2>&1 &
    echo $! >{folder}/pid/$node
done
"""
_HALT = """#!/bin/bash
for node in $(SLURM_CONF={folder}/slurm.conf /usr/bin/scontrol show hostnames "$1"); do
    [ ! -s {folder}/pid/$node ] || kill -KILL "$(<{folder}/pid/$node)"
    rm -f {folder}/pid/$node
done
"""
# slurmctld counts in whole seconds and ignores a node that seems to have come up before it was asked for, as one that
# boots at once may. Real ones take longer.
_RESUME = """#!/bin/bash
sleep 2
exec {folder}/boot $(SLURM_CONF={folder}/slurm.conf /usr/bin/scontrol show hostnames "$1")
"""
# cred_expire is also how long a requeued job waits before it starts again (120 s if nothing is said). TmpFS is of each
# node: they share /tmp. DefMemPerCPU: otherwise a job takes the memory of a whole node.
_CONF = """ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/spool/%n/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
TmpFS={folder}/spool/%n/tmp
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={memory_per_cpu}
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait={kill_wait_s}
MinJobAge=3600
TreeWidth=16
MaxArraySize=4001
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2
"""
_ON_DEMAND = """SuspendProgram={folder}/halt
ResumeProgram={folder}/resume
SuspendTime=120
SuspendExcNodes=node[1-{booted}]
ResumeRate=0
SuspendRate=0
SuspendTimeout=5
ResumeTimeout=120
PrivateData=cloud
"""


class ClusterError(RuntimeError):
    """The cluster did not come up, or a command of it failed; the message has the last lines of the log."""


def missing() -> str:
    """What keeps this machine from running a cluster, in one line; empty when nothing does."""
    if os.geteuid() != 0:
        return "needs root: the nodes are namespaces"
    lacks = sorted({package for name, package in PROGRAMS.items() if shutil.which(name, path=_PATH) is None})
    if lacks:
        return f"needs: apt-get install --no-install-recommends {' '.join(lacks)}"
    probe = subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "this machine allows no namespaces (unshare failed)"


def address(node: int) -> str:
    """Loopback address of node 1, 2, ...: 250 of them in each /24."""
    return f"127.0.{1 + (node - 1) // 250}.{1 + (node - 1) % 250}"


def wait_for(done: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll `done` until it holds.

    Raises:
        ClusterError: It did not within `timeout_s`.
    """
    end_s = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > end_s:
            raise ClusterError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.1)


class Cluster:
    """Start with `with Cluster(4) as cluster:`; everything it started is gone afterwards.

    Args:
        nodes: Nodes that slurmctld knows.
        booted: Nodes that run from the start; the others are booted when a job gets them. None: all.
        kill_wait_s: Seconds between SIGTERM and SIGKILL when a job is cancelled or out of time.
    """

    def __init__(self, nodes: int, booted: int | None = None, kill_wait_s: int = 30) -> None:
        self.nodes, self.booted = nodes, booted or nodes
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: unix sockets have 108 characters
        self.folder.chmod(0o755)
        self.port = _free_port(nodes)
        self._kill_wait_s = kill_wait_s
        self._daemons: list[subprocess.Popen[bytes]] = []
        os.mkfifo(self.folder / "alive")
        self._alive = os.open(self.folder / "alive", os.O_RDWR)
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            munge = [
                "munged",
                "-F",
                f"--socket={self.folder}/munge.sock",
                f"--key-file={self.folder}/munge.key",
                f"--pid-file={self.folder}/munged.pid",
                f"--log-file={self.folder}/log/munged.log",
                f"--seed-file={self.folder}/munge.seed",
                "--num-threads=4",
            ]
            self._daemon("munged", *munge)
            wait_for((self.folder / "munge.sock").exists, 20, "munged")
            self._daemon("slurmctld", "slurmctld", "-D", "-c")
            self.boot(*range(1, self.booted + 1))
            wait_for(lambda: self._idle() == self.booted, 120, f"{self.booted} idle nodes")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("wb") as out:  # it dies with the tests, however they end
            self._daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *command],
                    env={**os.environ, **self.env},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    def _configure(self) -> None:
        folder = self.folder
        for name in ("pid", "log", "state", "spool", "dev"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        for name, text in (("boot", _BOOT), ("halt", _HALT), ("resume", _RESUME)):
            (folder / name).write_text(text.replace("{folder}", str(folder)))
            (folder / name).chmod(0o755)
        # A gpu needs a character device, or slurmd counts it as 0; /dev/null's numbers will do.
        for gpu in range(GPUS):
            os.mknod(folder / "dev" / f"nvidia{gpu}", 0o020666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/dev/nvidia[0-{GPUS - 1}] Flags=nvidia_gpu_env\n")
        hosts = [f"{address(i)} node{i}" for i in range(1, self.nodes + 1)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        values = {
            "folder": folder,
            "port": self.port,
            "memory_per_cpu": MEMORY_MIB // CPUS,
            "booted": self.booted,
            "kill_wait_s": self._kill_wait_s,
        }
        text = _CONF + (_ON_DEMAND if self.booted < self.nodes else "") + self._node_lines()
        (folder / "slurm.conf").write_text(text.format(**values))

    def _node_lines(self) -> str:
        """A line for each /24 of addresses, and one more where the booted nodes end."""
        lines = [
            f"NodeName=DEFAULT CPUs={CPUS} Boards=1 Sockets=1 CoresPerSocket={CPUS} ThreadsPerCore=1 "
            f"RealMemory={MEMORY_MIB} Gres=gpu:{GPUS}"
        ]
        first = 1
        while first <= self.nodes:
            last = min(self.nodes, ((first - 1) // 250 + 1) * 250)
            last = min(last, self.booted) if first <= self.booted else last
            net, _, host = address(first).rpartition(".")
            state = "UNKNOWN" if first <= self.booted else "CLOUD"
            ports = f"{self.port + 10 + first}-{self.port + 10 + last}"
            addresses = f"{net}.[{host}-{int(host) + last - first}]"
            lines.append(f"NodeName=node[{first}-{last}] NodeAddr={addresses} Port=[{ports}] State={state}")
            first = last + 1
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE")
        return "\n".join(lines) + "\n"

    def _idle(self) -> int:
        if any(daemon.poll() is not None for daemon in self._daemons):
            raise ClusterError(f"a daemon ended: {self.log_end()}")
        shown = self.run("sinfo", "-hN", "-n", f"node[1-{self.booted}]", "-t", "idle", "-o", "%N", check=False)
        return len(shown.split())

    def log_end(self) -> str:
        """The last line that slurmctld wrote."""
        log = self.folder / "log" / "slurmctld.log"
        return log.read_text(errors="replace").strip().splitlines()[-1] if log.exists() else "slurmctld wrote nothing"

    def run(self, *command: str, check: bool = True, timeout_s: float = 120, **env: str) -> str:
        """Standard output of a client command.

        Raises:
            ClusterError: It failed (with `check`); the message is its standard error.
        """
        done = subprocess.run(
            command,
            env={**os.environ, **self.env, **env},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job` (JobState, Restarts, NodeList, ExitCode, ...)."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_job(self, job_id: str, timeout_s: float = 120) -> str:
        """Wait until a job has ended for good; returns its state.

        Raises:
            ClusterError: It had not after `timeout_s`.
        """
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE")
        wait_for(lambda: self.job(job_id)["JobState"] in ended, timeout_s, f"the end of job {job_id}")
        return self.job(job_id)["JobState"]

    def boot(self, *nodes: int) -> None:
        """Power these nodes on."""
        subprocess.run([self.folder / "boot", *(f"node{i}" for i in nodes)], check=True)

    def kill(self, node: str) -> None:
        """Power failure of one node; slurmctld is told, or it would take `SlurmdTimeout` to notice."""
        _end(self.folder / "pid" / node)
        self.run("scontrol", "update", f"node={node}", "state=down", "reason=power")

    def stop(self) -> None:
        """End every process of the cluster and remove its folder."""
        for daemon in reversed(self._daemons):  # slurmctld first: it would act on the loss of the nodes
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait(timeout=20)
        for pid in (self.folder / "pid").glob("node*"):
            _end(pid)
        os.close(self._alive)
        shutil.rmtree(self.folder, ignore_errors=True)


def _end(pid_file: Path) -> None:
    """Kill what a pid file of a node names: the `unshare` there, and so all of the node. Waits until it is gone."""
    try:
        pid = int(pid_file.read_text())
        ours = b"unshare" in Path(f"/proc/{pid}/cmdline").read_bytes()  # a process id can be used again
    except (OSError, ValueError):
        return
    if ours:
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: _gone(pid), 20, f"the end of {pid_file.name}")
    pid_file.unlink(missing_ok=True)


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _free_port(nodes: int) -> int:
    """A port such that it, and one for each node behind it, are likely free; clusters beside this one differ."""
    step = nodes + 20
    for base in range(12000 + os.getpid() % 4000, 30000, step):
        with socket.socket() as probe:
            try:
                probe.bind(("", base))
                return base
            except OSError:
                continue
    raise ClusterError("no free port")


def main(arguments: list[str]) -> int:
    """`python -m tests.helpers.cluster NODES COMMAND...`: run a command with a cluster around it; its exit code."""
    if lacks := missing():
        print(f"error: no SLURM cluster here: {lacks}", file=sys.stderr)
        return 65
    with Cluster(int(arguments[0])) as cluster:
        return subprocess.run(arguments[1:], env={**os.environ, **cluster.env}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
