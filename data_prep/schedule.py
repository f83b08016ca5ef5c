"""What can be worked on next: one queue over the steps of many slides. Pure; no MPI, no files, no pixels.

A `Queue` is what pool and ranks are fed from. `Flat` holds independent tasks. `Schedule` holds plans, whose steps
become possible as others are done: it prefers later stages, so that a slide that was begun is finished before the
next one takes up space, and otherwise keeps the order of the plans. No step waits for anything but its own slide.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol


class Queue(Protocol):
    """Tasks for workers: take one, do it, say that it is done, until it is over."""

    @property
    def over(self) -> bool:
        """Nothing is left and nothing is being worked on."""

    def take(self) -> Any:
        """The next task, None if there is none now; one may come when another is done."""

    def done(self, task: Any, result: Any) -> list[Any]:
        """Take the result of a task. Returns what is finished by it and worth telling."""


class Flat:
    """Independent tasks in the order given; every result is worth telling."""

    def __init__(self, tasks: Iterable[Any]) -> None:
        self._tasks = deque(tasks)
        self._running = 0

    @property
    def over(self) -> bool:
        """As `Queue.over`."""
        return not self._tasks and not self._running

    def take(self) -> Any:
        """As `Queue.take`."""
        if not self._tasks:
            return None
        self._running += 1
        return self._tasks.popleft()

    def done(self, task: Any, result: Any) -> list[Any]:  # noqa: ARG002
        """As `Queue.done`."""
        self._running -= 1
        return [result]


class Plan(Protocol):
    """The steps of one piece of work. Steps have an integer `stage`."""

    def first(self) -> list[Any]:
        """Steps that need nothing."""

    def done(self, step: Any, result: Any) -> tuple[list[Any], list[Any]]:
        """Steps that are possible now that `step` has this result, and what is worth telling."""

    @property
    def failed(self) -> bool:
        """Steps that were not begun yet are not wanted any more."""

    def drop(self, steps: int) -> list[Any]:
        """So many steps will not be done. Returns what is worth telling."""


class Schedule:
    """Steps of many plans, later stages first, then in the order of the plans."""

    def __init__(self, plans: Iterable[Plan]) -> None:
        self._ready: list[tuple[int, int, int, Any]] = []
        self._handed: dict[int, tuple[int, Any]] = {}  # by id of the step: its plan's number and itself
        self._plans = list(plans)
        self._count = 0
        for order, plan in enumerate(self._plans):
            self._add(order, plan.first())

    @property
    def over(self) -> bool:
        """As `Queue.over`."""
        return not self._ready and not self._handed

    def take(self) -> Any:
        """As `Queue.take`."""
        if not self._ready:
            return None
        _, order, _, step = heapq.heappop(self._ready)
        self._handed[id(step)] = (order, step)
        return step

    def done(self, task: Any, result: Any) -> list[Any]:
        """As `Queue.done`."""
        order, _ = self._handed.pop(id(task))
        steps, told = self._plans[order].done(task, result)
        self._add(order, steps)
        if self._plans[order].failed:
            kept = [entry for entry in self._ready if entry[1] != order]
            if len(kept) < len(self._ready):
                told = told + self._plans[order].drop(len(self._ready) - len(kept))
                heapq.heapify(kept)
                self._ready = kept
        return told

    def _add(self, order: int, steps: list[Any]) -> None:
        for step in steps:
            self._count += 1
            heapq.heappush(self._ready, (-step.stage, order, self._count, step))
