"""Runs many independent tasks on the cores of one machine; a worker that dies costs its task, not the run.

`concurrent.futures` gives up on everything when one process is killed (out of memory, a crash inside a C reader). Here
a new worker starts and the rest goes on. Workers are spawned, not forked, since the parent may hold threads.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from data_prep.parallel.queue import Flat, Queue

TaskT = TypeVar("TaskT")


def _work(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """Worker: take a task, send its result, until the pipe closes (also when the parent was killed)."""
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        result = function(task)
        try:
            pipe.send(result)
        except OSError:  # nobody is there to want it
            return


class _Worker(Generic[TaskT]):
    """One process, its pipe and its task."""

    def __init__(self, function: Callable[[TaskT], Any], number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        self.number = number
        self.task: TaskT | None = None

    def give(self, task: TaskT) -> None:
        """Send a task. If the worker has died, the pipe says so when its result is awaited."""
        self.task = task
        with suppress(OSError):
            self.pipe.send(task)

    def stop(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C back while workers start; it comes at the end of the block. Workers never see it.

    Ctrl-C is for the parent, which stops its workers. They start with SIGINT blocked, since a half-started one would
    die with a traceback. Python runs its handler in the main thread even when another thread got the signal, so the
    handler is exchanged too. The first worker would start multiprocessing's resource tracker, which unblocks SIGINT, so
    the tracker is started before.
    """
    held: list[tuple[int, Any]] = []
    handler: Any = None
    main = threading.current_thread() is threading.main_thread()
    if main:
        handler = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main:
            signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
            if held and callable(handler):
                handler(*held[0])


def run_pool(
    function: Callable[[Any], Any],
    tasks: Queue | Iterable[Any],
    jobs: int,
    died: Callable[[Any, str], Any],
    idle: Callable[[], None] = lambda: None,
    idle_s: float = 5.0,
) -> Generator[Any, None, None]:
    """Do the tasks in worker processes and yield what their queue tells. Closing the generator stops the workers.

    A task whose worker died is done once more by a new worker: the system may have ended the first one for memory that
    another one used. If the second dies too, the task has failed.

    Args:
        function: Importable function of one task; runs in the workers and does not raise.
        tasks: A queue, or picklable tasks in the order in which they begin, whose results are then yielded.
        jobs: Worker processes.
        died: Makes the result of a task whose worker died twice, from the task and a sentence.
        idle: Called when nothing was ready for `idle_s` seconds (progress lines of long tasks).
    """
    queue: Queue = Flat(tasks) if isinstance(tasks, Iterable) else tasks
    workers: list[_Worker[Any]] = []
    numbers = count()
    again: deque[Any] = deque()
    tried: list[Any] = []  # tasks whose worker died once, until they are done

    def feed() -> None:
        """Give every task that is possible now to a worker that is free, or to a new one."""
        while True:
            free = next((worker for worker in workers if worker.task is None), None)
            if free is None and len(workers) >= jobs:
                return
            number = free.number if free else next(numbers)
            task = again.popleft() if again else queue.take(number)
            if task is None:
                return
            if free is None:
                with _interrupts_later():
                    free = _Worker(function, number)
                    workers.append(free)
            free.give(task)

    try:
        feed()
        while busy := {worker.pipe: worker for worker in workers if worker.task is not None}:
            ready = wait(list(busy), timeout=idle_s)
            if not ready:
                idle()
            for pipe in ready:
                # Take the result, or give the task of a dead worker to another one.
                worker = busy[pipe]  # type: ignore[index]
                task, worker.task = worker.task, None
                assert task is not None
                try:
                    result = worker.pipe.recv()
                except (EOFError, OSError):  # OSError: in the middle of a result
                    worker.process.join()
                    worker.stop()
                    workers.remove(worker)
                    if not any(task is other for other in tried):
                        tried.append(task)
                        again.append(task)
                        feed()
                        continue
                    result = died(task, f"{_cause(worker.process.exitcode)}, twice")

                # Keep the workers busy before anyone looks at the result.
                tried[:] = [other for other in tried if other is not task]
                told = queue.done(task, result)
                feed()
                yield from told
    finally:
        for worker in workers:
            worker.stop()


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"its worker process was killed by {name}{hint}"
    return f"its worker process ended with exit code {code}"
