"""Many independent tasks on the cores of one machine; a worker that dies costs its task, not the run.

`concurrent.futures` gives up on everything when one process is killed (out of memory, a crash inside a C reader). Here
the task fails, a new worker starts, and the rest goes on. Workers are spawned, not forked: the parent may hold threads.
Must not import MPI or anything of this project.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")


def _work(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """Worker: take a task, send its result, until the pipe closes (also when the parent was killed)."""
    while True:
        try:
            task = pipe.recv()
            pipe.send(function(task))
        except (EOFError, ConnectionError):
            return


class _Worker(Generic[TaskT]):
    """One process, its pipe and the task it is on."""

    def __init__(self, function: Callable[[TaskT], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, function), daemon=True)
        # Ctrl-C is for the parent, which then stops its workers: they are born with SIGINT blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self.process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.task: TaskT | None = None

    def give(self, task: TaskT) -> None:
        self.task = task
        self.pipe.send(task)

    def stop(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def run_pool(
    function: Callable[[TaskT], ResultT],
    tasks: Iterable[TaskT],
    jobs: int,
    died: Callable[[TaskT, str], ResultT],
    idle: Callable[[], None] = lambda: None,
    idle_s: float = 5.0,
) -> Iterator[ResultT]:
    """Results of `function(task)` as they are ready; tasks are begun in the order given.

    Args:
        function: Importable function of one task; runs in the workers and does not raise.
        tasks: Tasks; picklable.
        jobs: Worker processes.
        died: Makes the result of a task whose worker died; gets the task and a sentence.
        idle: Called when nothing was ready for `idle_s` seconds (progress lines of long tasks).
        idle_s: See `idle`.
    """
    queue = deque(tasks)
    workers = [_Worker(function) for _ in range(min(jobs, len(queue)))]
    try:
        for worker in workers:
            worker.give(queue.popleft())
        while busy := {worker.pipe: worker for worker in workers if worker.task is not None}:
            ready = wait(list(busy), timeout=idle_s)
            if not ready:
                idle()
            for pipe in ready:
                worker = busy[pipe]     # type: ignore[index]
                task, worker.task = worker.task, None
                try:
                    result = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    assert task is not None
                    result = died(task, _cause(worker.process.exitcode))
                    worker.pipe.close()
                    workers[workers.index(worker)] = worker = _Worker(function)
                if queue:
                    worker.give(queue.popleft())
                yield result
    finally:
        for worker in workers:
            worker.stop()


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ": out of memory?" if name == "SIGKILL" else ""
        return f"its worker process was killed by {name}{hint}"
    return f"its worker process ended with exit code {code}"
