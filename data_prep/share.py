"""The same tasks shared over MPI ranks, each rank taking the next one when it is free.

`comm` is an argument and never imported here. Rank 0 hands out tasks and works too (in a thread of its own; only the
main thread speaks MPI), so two ranks do the work of two.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")
_TAG = 7
_POLL_S = 0.005


class LaunchError(RuntimeError):
    """Started under a launcher that does not fit the MPI library; one line with the remedy."""


def wants_mpi(env: Mapping[str, str] = os.environ) -> bool:
    """Whether an MPI launcher or a SLURM step of several tasks started this process.

    Plain runs return False, and so never need mpi4py. A step of one task, or the batch script itself, is a plain run.
    """
    if int(env.get("PMI_SIZE") or env.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return True
    return _slurm_tasks(env) > 1


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """Tasks of the SLURM step this process is in; 1 outside of steps."""
    return int(env.get("SLURM_NTASKS") or 1) if "SLURM_STEP_ID" in env else 1


def check_world(size: int, env: Mapping[str, str] = os.environ) -> None:
    """Refuse N worlds of one: the wrong `srun --mpi` starts N copies that each think they are alone, and exits 0.

    A launcher of its own inside an allocation (`mpiexec`) may start another number of ranks than SLURM has tasks; that
    is fine when it says so itself.

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
    function: Callable[[TaskT], ResultT],
    tasks: Sequence[TaskT],
    idle: Callable[[], None] = lambda: None,
    idle_s: float = 5.0,
) -> Generator[ResultT, None, None]:
    """Results of all tasks, on rank 0, as they are ready; other ranks work and yield nothing. Collective.

    Args:
        comm: mpi4py communicator.
        function: What to do with one task; does not raise.
        tasks: The tasks, in the order to begin them; only rank 0's are used.
        idle: Called on rank 0 when nothing was ready for `idle_s` seconds.
        idle_s: See `idle`.
    """
    if comm.rank == 0:
        yield from _hand_out(comm, function, deque(tasks), idle, idle_s)
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
    comm: Any, function: Callable[[TaskT], ResultT], queue: deque[TaskT], idle: Callable[[], None], idle_s: float
) -> Iterator[ResultT]:
    """Rank 0: answer every request, and keep one thread at work on tasks of its own."""
    working = comm.size - 1
    own: Future[ResultT] | None = None
    last_s = time.monotonic()
    thread = ThreadPoolExecutor(1)
    try:
        while queue or own is not None or working:
            results = []
            if own is not None and own.done():
                results.append(own.result())
                own = None
            if own is None and queue:
                own = thread.submit(function, queue.popleft())
            while working and comm.iprobe(tag=_TAG):
                rank, result = comm.recv(tag=_TAG)
                if result is not None:
                    results.append(result)
                task = queue.popleft() if queue else None
                working -= task is None
                comm.send(task, dest=rank, tag=_TAG)
            if results:
                last_s = time.monotonic()
                yield from results
            elif time.monotonic() - last_s > idle_s:
                last_s = time.monotonic()
                idle()
            else:
                time.sleep(_POLL_S)
    finally:
        thread.shutdown(wait=False)     # after Ctrl-C its task must not keep the other ranks waiting
