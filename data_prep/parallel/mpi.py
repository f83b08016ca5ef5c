"""Shares tasks over MPI ranks: each rank takes the next one when it is free.

`comm` is an argument and never imported here. Rank 0 hands out tasks by messages and works too, in a thread of its own;
only the main thread speaks MPI. A shared counter would not do: which task is possible depends on which are done, and
only rank 0 knows.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from data_prep.parallel.queue import Queue

_TAG = 7
_POLL_S = 0.001


class LaunchError(RuntimeError):
    """The launcher does not fit the MPI library; one line with the remedy."""

    exit_code = 64


def wants_mpi(env: Mapping[str, str] = os.environ) -> bool:
    """Whether an MPI launcher, or a SLURM step of several tasks, started this process.

    A step of one task and the batch script itself are plain runs; these never need mpi4py.
    """
    if _number(env, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE") > 1:
        return True
    return _slurm_tasks(env) > 1


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """Tasks of this process's SLURM step; 1 outside of steps."""
    return _number(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if "SLURM_STEP_ID" in env else 1


def _number(env: Mapping[str, str], *names: str) -> int:
    """The first of these variables that is set, 1 if none is. Raises LaunchError if it is no number."""
    name = next((name for name in names if env.get(name)), None)
    if name is None:
        return 1
    if not env[name].isdecimal():
        raise LaunchError(f"{name}={env[name]!r} is not a number of tasks")
    return int(env[name])


def lonely(env: Mapping[str, str] = os.environ) -> str | None:
    """A warning for a process that is alone in a SLURM job of several tasks, outside of any step; None else."""
    tasks = _number(env, "SLURM_NTASKS") if "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env else 1
    if tasks <= 1 or wants_mpi(env):
        return None
    return f"SLURM gave this job {tasks} tasks, but this is one process: start it with srun, or use --jobs"


def check_world(size: int, env: Mapping[str, str] = os.environ) -> None:
    """Refuse N worlds of one: a wrong `srun --mpi` starts N copies that each think they are alone.

    A launcher inside an allocation (`mpiexec`) may start another number of ranks than SLURM has tasks, if it says so
    itself.

    Raises:
        LaunchError: The number of ranks is not what the launcher started.
    """
    tasks = _slurm_tasks(env)
    launched = int(env.get("PMI_SIZE") or env.get("OMPI_COMM_WORLD_SIZE") or 0)
    if tasks > 1 and size != tasks and not (size > 1 and size == launched):
        raise LaunchError(
            f"SLURM started {tasks} tasks but MPI sees {size}: the launcher does not fit the MPI library. "
            "Use srun --mpi=pmi2 for MPICH, srun --mpi=pmix for Open MPI, or mpiexec"
        )
    if tasks <= 1 and launched > 1 and size != launched:
        raise LaunchError(
            f"the launcher started {launched} ranks but MPI sees {size}: mpiexec and mpi4py use different MPI libraries"
        )


def share(
    comm: Any,
    function: Callable[[Any], Any],
    queue: Queue | None,
    idle: Callable[[], None] = lambda: None,
    idle_s: float = 5.0,
) -> Generator[Any, None, None]:
    """Do the tasks on all ranks; rank 0 yields what the queue tells, the others yield nothing. Collective.

    Args:
        comm: mpi4py communicator of at least 2 ranks.
        function: Function of one task; does not raise.
        queue: Tasks, on rank 0.
        idle: Called on rank 0 when nothing was ready for `idle_s` seconds.
    """
    if comm.rank == 0:
        assert queue is not None
        yield from _hand_out(comm, function, queue, idle, idle_s)
    else:
        _take(comm, function)
    # A waiting rank would spin on its core in a blocking call, which the others may need.
    gone = comm.Ibarrier()
    while not gone.Test():
        time.sleep(_POLL_S)


def _take(comm: Any, function: Callable[[Any], Any]) -> None:
    """Worker rank: send the last result (None at first), get a task, until there is none."""
    result = None
    while True:
        comm.send((comm.rank, result), dest=0, tag=_TAG)
        while not comm.iprobe(source=0, tag=_TAG):
            time.sleep(_POLL_S)
        task = comm.recv(source=0, tag=_TAG)
        if task is None:
            return
        result = function(task)


def _hand_out(
    comm: Any, function: Callable[[Any], Any], queue: Queue, idle: Callable[[], None], idle_s: float
) -> Iterator[Any]:
    """Rank 0: answer every request, and keep one thread at work on tasks of its own."""
    waiting: deque[int] = deque()  # ranks that asked and were not answered yet
    given: dict[int, Any] = {}
    working = comm.size - 1
    own: tuple[Any, Future[Any]] | None = None
    last_s = time.monotonic()
    thread = ThreadPoolExecutor(1)
    try:
        while working:
            # Take results.
            told = []
            if own is not None and own[1].done():
                told += queue.done(own[0], own[1].result())
                own = None
            while comm.iprobe(tag=_TAG):
                rank, result = comm.recv(tag=_TAG)
                if rank in given:
                    told += queue.done(given.pop(rank), result)
                waiting.append(rank)

            # Give tasks to whoever waits, and to this rank's own thread.
            while waiting and (task := queue.take(waiting[0])) is not None:
                given[waiting[0]] = task
                comm.send(task, dest=waiting.popleft(), tag=_TAG)
            if own is None and (task := queue.take()) is not None:
                own = task, thread.submit(function, task)
            while queue.over and waiting:
                working -= 1
                comm.send(None, dest=waiting.popleft(), tag=_TAG)

            # Tell, or rest a little.
            if told:
                last_s = time.monotonic()
                yield from told
            elif time.monotonic() - last_s > idle_s:
                last_s = time.monotonic()
                idle()
            else:
                time.sleep(_POLL_S)
    finally:
        thread.shutdown(wait=False)  # after Ctrl-C its task must not keep the other ranks waiting
