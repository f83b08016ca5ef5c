"""Which rank this process is, under which launcher; starting and ending the process group.

The rank is known before torch is loaded, so that a wrong setting is reported within a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from launch.records.record import cpu_name

if TYPE_CHECKING:
    import torch

Answer = TypeVar("Answer")
EXIT_OK = 0
EXIT_CRASH = 1
EXIT_CONFIG = 64
EXIT_AGAIN = 75
_meeting_place: list[str] = []  # URL of this process's rendezvous, for tidying up


class RankError(ValueError):
    """The launcher's environment lacks something; one line, exit code 64."""

    exit_code = 64


@dataclass(frozen=True)
class Ranks:
    """Place of this process among all processes of the run."""

    rank: int  # 0 .. world - 1
    world: int
    local: int  # index among the processes of this node
    local_world: int  # processes of this node
    nodes: int
    launcher: str  # torchrun, srun, openmpi, hydra or alone
    init_method: str  # URL of the rendezvous (env://, tcp://host:port, file://path), empty when alone


def find_ranks(env: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that the launcher's environment variables describe.

    One launcher can run inside another, so the order is: torchrun, srun, Open MPI, MPICH (hydra, PMI). An sbatch script
    that calls Python without srun is one process, whatever SLURM_NTASKS says: only steps count.

    Raises:
        RankError: Several nodes, and the first one's address is unknown.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        world = int(env["WORLD_SIZE"])
        local_world = int(env.get("LOCAL_WORLD_SIZE", world))
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise RankError(f"RANK and WORLD_SIZE are set but {', '.join(missing)} is not; torchrun sets all of them")
        local = int(env.get("LOCAL_RANK", int(env["RANK"]) % local_world))
        # The job scripts set these variables for each task of a step; under torchrun, tasks are not ranks.
        step = (env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS")) == (env["RANK"], env["WORLD_SIZE"])
        launcher = "srun" if step else "torchrun"
        return Ranks(int(env["RANK"]), world, local, local_world, max(1, world // local_world), launcher, "env://")
    step_tasks = int(env.get("SLURM_STEP_NUM_TASKS", "0"))
    pmi_world = int(env.get("OMPI_COMM_WORLD_SIZE", env.get("PMI_SIZE", "0")))
    if step_tasks > 1 and pmi_world in (0, step_tasks):
        return _slurm(env, step_tasks)
    if "OMPI_COMM_WORLD_RANK" in env:
        return _mpi(env, "openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    if pmi_world:
        return _mpi(env, "hydra", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    return Ranks(0, 1, 0, 1, 1, "alone", "")


def _slurm(env: Mapping[str, str], world: int) -> Ranks:
    nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
    # "4(x2),3" means 4 tasks on two nodes and 3 on the last; our own node's share is what counts.
    local_world = _tasks_of_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""), int(env.get("SLURM_NODEID", "0")))
    host = env.get("MASTER_ADDR") or _first_host(env)
    job, step = int(env.get("SLURM_JOB_ID", "0")), int(env.get("SLURM_STEP_ID", "0"))
    port = env.get("MASTER_PORT") or 20000 + (job * 16 + step) % 20000
    rank, local = int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", "0"))
    return Ranks(rank, world, local, local_world or max(1, world // nodes), nodes, "srun", f"tcp://{host}:{port}")


def _tasks_of_node(text: str, node: int) -> int:
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        tasks, _, repeat = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(repeat or 1)
    return counts[node] if node < len(counts) else 0


def _first_host(env: Mapping[str, str]) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    if "[" not in nodes and nodes:
        return nodes.split(",")[0]
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise RankError(f"cannot find the first host of {nodes!r} with scontrol; set MASTER_ADDR") from None


def _mpi(env: Mapping[str, str], launcher: str, rank_key: str, local_key: str, local_world_key: str) -> Ranks:
    world = int(env.get("OMPI_COMM_WORLD_SIZE", env.get("PMI_SIZE", "1")))
    local_world = int(env.get(local_world_key, world))
    nodes = -(-world // local_world)
    if world == 1:
        return Ranks(0, 1, 0, 1, 1, launcher, "")
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        method = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    elif nodes == 1:
        # All ranks of one node are children of one launcher process. A file named after it is a rendezvous of
        # this run alone and needs no free port. The start time guards against a reused process id.
        parent = os.getppid()
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
        folder = os.environ.get("TMPDIR", "/tmp")
        method = f"file://{folder}/apf-launch-{os.getuid()}-{parent}-{started}"
    else:
        raise RankError(f"{world} ranks on {nodes} nodes under mpiexec: set MASTER_ADDR and MASTER_PORT (first node)")
    return Ranks(int(env[rank_key]), world, int(env.get(local_key, "0")), local_world, nodes, launcher, method)


def pick_device(choice: str, ranks: Ranks) -> torch.device:
    """The device of this rank: its local GPU, or the only visible one, or the CPU.

    Raises:
        RankError: `cuda` was asked for, and there are no GPUs, or fewer than ranks on this node.
    """
    import torch

    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise RankError("engine.device=cuda but torch sees no GPU; use engine.device=auto or cpu")
    if count > 1 and ranks.local >= count:
        raise RankError(f"{ranks.local_world} ranks on this node but torch sees {count} GPUs")
    return torch.device("cuda", ranks.local if count > 1 else 0)


def device_name(device: torch.device) -> str:
    """Model name of a GPU, or of the CPU when that is the device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def end_with_launcher(ranks: Ranks) -> None:
    """Ask the kernel for a SIGTERM when the launcher of this rank dies (Linux; torchrun and mpiexec only).

    These launchers start ranks in sessions of their own. After `kill -9` of the launcher, ranks would train on unseen
    and share the machine with a second start. A run alone may outlive its shell on purpose.
    """
    if ranks.launcher not in ("torchrun", "hydra", "openmpi") or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # 1 = PR_SET_PDEATHSIG
    if os.getppid() != parent:  # the launcher died just before
        os.kill(os.getpid(), signal.SIGTERM)


def share_threads(ranks: Ranks, wanted: int = 0) -> int:
    """Give torch this rank's share of the cores that the process may use; returns the number of threads."""
    import torch

    cores = len(os.sched_getaffinity(0))
    # A launcher that binds ranks to cores has already shared them out.
    bound = cores < (os.cpu_count() or cores) and ranks.local_world > 1 and cores * ranks.local_world <= os.cpu_count()  # type: ignore[operator]
    threads = wanted or max(1, cores if bound else cores // ranks.local_world)
    torch.set_num_threads(threads)
    return threads


def start(ranks: Ranks, device: torch.device, timeout_s: float = 1800.0) -> None:
    """Start the default process group, also for one rank: gloo for CPU tensors, and nccl beside it on GPUs."""
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # NCCL's flight recorder, which the watchdog writes out
    limit = timedelta(seconds=timeout_s)
    _meeting_place.append(ranks.init_method)
    meet: dict[str, Any] = {"init_method": ranks.init_method, "rank": ranks.rank, "world_size": ranks.world}
    if not ranks.init_method:
        meet = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    dist.init_process_group(backend, timeout=limit, **meet)


def on_first_rank(work: Callable[[], Answer]) -> Answer:
    """Call `work` on rank 0 while the others wait; all ranks return its answer or raise its error."""
    import torch.distributed as dist

    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    found: Answer = answer[0]
    return found


def finish(code: int) -> NoReturn:
    """End this rank after a completed run with its real exit code; all ranks must get here.

    Barrier, destroy, flush, `os._exit`: otherwise gloo's threads now and then abort a process at exit, after correct
    results ("terminate called without an active exception").
    """
    import torch.distributed as dist

    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    leave(code)


def leave(code: int) -> NoReturn:
    """Flush and end this rank at once with `code`, waiting for no other rank."""
    for method in _meeting_place:
        if method.startswith("file://"):  # os._exit runs no destructor, so torch leaves the file
            Path(method.removeprefix("file://")).unlink(missing_ok=True)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
