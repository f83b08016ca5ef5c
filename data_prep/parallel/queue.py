"""Says what can be worked on next: one queue over the steps of many slides, without MPI, files or pixels.

Pool and ranks take their work from a `Queue`. `Flat` holds independent tasks. `Schedule` holds plans, whose steps
become possible as others are done. It prefers later stages, so a slide is finished before the next one takes up space;
otherwise it keeps the order of the plans. A step waits only for its own slide.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol


class Queue(Protocol):
    """Tasks for workers: take one, do it, say that it is done, until the queue is over."""

    @property
    def over(self) -> bool:
        """Nothing is left and nothing is being worked on."""

    def take(self, worker: int = 0) -> Any:
        """The next task for that worker, None if there is none now; one may come when another is done."""

    def done(self, task: Any, result: Any) -> list[Any]:
        """Take the result of a task; return finished results that are worth telling."""


class Flat:
    """Independent tasks in the order given; every result is worth telling."""

    def __init__(self, tasks: Iterable[Any]) -> None:
        self._tasks = deque(tasks)
        self._running = 0

    @property
    def over(self) -> bool:
        """As `Queue.over`."""
        return not self._tasks and not self._running

    def take(self, worker: int = 0) -> Any:  # noqa: ARG002
        """As `Queue.take`."""
        if not self._tasks:
            return None
        self._running += 1
        return self._tasks.popleft()

    def done(self, task: Any, result: Any) -> list[Any]:  # noqa: ARG002
        """As `Queue.done`."""
        self._running -= 1
        return [result]


class WorkPlan(Protocol):
    """The steps of one piece of work. Steps have an integer `stage`."""

    def first(self) -> list[Any]:
        """Steps that need no other."""

    def done(self, step: Any, result: Any) -> tuple[list[Any], list[Any]]:
        """Steps that are possible now that `step` has this result, and what is worth telling."""

    @property
    def failed(self) -> bool:
        """Whether the remaining steps are not wanted any more."""

    def drop(self, steps: int) -> list[Any]:
        """So many steps will not be done; return what is worth telling."""


class _Stage:
    """Steps of one stage of one plan, in their order; each worker has a stretch of them.

    Neighbouring regions share pixels, and the worker that just decoded these still has them. So a worker goes on where
    it was. One that has nothing left takes the second half of the longest stretch.
    """

    def __init__(self) -> None:
        self._stretches: dict[int, deque[Any]] = {}  # by worker; below 0: nobody's

    def add(self, steps: list[Any]) -> None:
        self._stretches[min(0, min(self._stretches, default=0)) - 1] = deque(steps)

    def __len__(self) -> int:
        return sum(map(len, self._stretches.values()))

    def take(self, worker: int) -> Any:
        """The next step; there must be one."""
        if worker not in self._stretches:
            self._stretches[worker] = self._share()
        step = self._stretches[worker].popleft()
        if not self._stretches[worker]:
            del self._stretches[worker]
        return step

    def _share(self) -> deque[Any]:
        nobodys = min(self._stretches)
        if nobodys < 0:
            return self._stretches.pop(nobodys)
        longest = max(self._stretches, key=lambda worker: len(self._stretches[worker]))
        stretch = self._stretches[longest]
        half = deque(stretch.pop() for _ in range((len(stretch) + 1) // 2))
        half.reverse()
        if not stretch:
            del self._stretches[longest]
        return half


class Schedule:
    """Steps of many plans, later stages first, then in the order of the plans."""

    def __init__(self, plans: Iterable[WorkPlan]) -> None:
        self._ready: dict[tuple[int, int], _Stage] = {}  # by what comes first: (-stage, number of the plan)
        self._order: list[tuple[int, int]] = []  # a heap of its keys
        self._handed: dict[int, tuple[int, Any]] = {}  # by id of the step: its plan's number and itself
        self._plans = list(plans)
        for order, plan in enumerate(self._plans):
            self._add(order, plan.first())

    @property
    def over(self) -> bool:
        """As `Queue.over`."""
        return not self._ready and not self._handed

    def take(self, worker: int = 0) -> Any:
        """As `Queue.take`."""
        if not self._order:
            return None
        first = self._order[0]
        step = self._ready[first].take(worker)
        if not self._ready[first]:
            del self._ready[first]
            heapq.heappop(self._order)
        self._handed[id(step)] = (first[1], step)
        return step

    def done(self, task: Any, result: Any) -> list[Any]:
        """As `Queue.done`."""
        order, _ = self._handed.pop(id(task))
        steps, told = self._plans[order].done(task, result)
        self._add(order, steps)
        if self._plans[order].failed:
            dropped = [key for key in self._ready if key[1] == order]
            if dropped:
                told = told + self._plans[order].drop(sum(len(self._ready.pop(key)) for key in dropped))
                self._order = sorted(self._ready)
        return told

    def _add(self, order: int, steps: list[Any]) -> None:
        for stage in sorted({step.stage for step in steps}):
            key = (-stage, order)
            if key not in self._ready:
                self._ready[key] = _Stage()
                heapq.heappush(self._order, key)
            self._ready[key].add([step for step in steps if step.stage == stage])
