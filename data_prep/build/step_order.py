"""Which step of a slide comes when: plain bookkeeping for `data_prep.parallel.queue`; the steps are in `steps`.

Must not import pixels, files, MPI or torch: rank 0 runs this between messages.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.build.outcome import Hashes, Outcome, Task

_KINDS = ("begin", "hash", "scan", "limits", "edges", "light", "plan", "tree", "tokens", "write")
_SHARES = {"scan": 0.6, "edges": 0.2, "plan": 0.05, "tokens": 0.15}  # of the work, for the progress bar


@dataclass(frozen=True)
class Step:
    """One step of one slide.

    Attributes:
        kind: one of begin, hash, scan, limits, edges, light, plan, tree, tokens, write.
        task: the slide and its parameters.
        side_px: side of the regions.
        index: number of the region, row by row; 0 for steps of the slide.
        regions: all regions with content, for the steps that join them.
        hashes: of slide and mask, for `write`.
        folder: the slide's scratch folder, None before it has one.
    """

    kind: str
    task: Task
    side_px: int
    index: int = 0
    regions: tuple[int, ...] = ()
    hashes: Hashes | None = None
    folder: Path | None = None

    @property
    def stage(self) -> int:
        """Later stages have larger numbers."""
        return _KINDS.index(self.kind)


@dataclass
class StepResult:
    """What became of a step.

    Attributes:
        outcome: carries failure, or the end of the slide; else its sources and stage times only.
        ended: nothing more is to be done for this slide.
        side_px: side of the regions that the slide has (an earlier run may have chosen it).
        regions: regions with content, after `begin`.
        have: results of an earlier run, by kind: regions that are done.
        hashes: of slide and mask, where they are known.
        folder: the slide's scratch folder, after `begin`.
        counted: numbers to add up over the slide: pixels, blocks.
    """

    outcome: Outcome
    ended: bool = False
    side_px: int = 0
    regions: tuple[int, ...] = ()
    have: dict[str, set[int]] = field(default_factory=dict)
    hashes: Hashes | None = None
    folder: Path | None = None
    counted: dict[str, int] = field(default_factory=dict)


@dataclass
class Moved:
    """Progress of one slide, in slides."""

    by: float
    note: str


class SlidePlan:
    """The steps of one slide, for `data_prep.parallel.queue`: what is possible after what."""

    def __init__(self, task: Task, side_px: int) -> None:
        self.task, self.side_px = task, side_px
        self.regions: tuple[int, ...] = ()
        self.have: dict[str, set[int]] = {}
        self.hashes: Hashes | None = None
        self.folder: Path | None = None
        self.left: Counter[str] = Counter()  # steps of a kind that are not done
        self.running = 0
        self.outcome: Outcome | None = None  # of the slide, once it is known
        self.seconds: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        self.sources: dict[str, tuple[str, int, int, int]] = {}
        self.reason = ""
        self.moved = 0.0
        self.started_s = 0.0

    def first(self) -> list[Step]:
        """As `Plan.first`."""
        self.running = 1
        return [Step("begin", self.task, self.side_px)]

    def done(self, step: Step, result: StepResult) -> tuple[list[Step], list[Any]]:
        """As `Plan.done`; tells of progress, and at the end the slide's outcome."""
        self.running -= 1
        self._note(step, result)
        steps: list[Step] = []
        if result.ended and (self.outcome is None or result.outcome.status == "failed"):
            self.outcome = self.outcome or result.outcome
        elif self.outcome is None:
            steps = self._next(step, result)
        self.running += len(steps)
        told: list[Any] = []
        if self.outcome is not None and not self.running:
            told += self.drop(0)
        elif step.kind in _SHARES and self.outcome is None:
            by = _SHARES[step.kind] / len(self.regions)
            self.moved += by
            todo = self.left[step.kind]
            done = f"{len(self.regions) - todo}/{len(self.regions)}"
            told.append(Moved(by, f"{self.task.slide.stem}: {step.kind} {done}"))
        return steps, told

    def drop(self, steps: int) -> list[Any]:
        """As `Plan.drop`."""
        self.running -= steps
        if self.running or self.outcome is None:
            return []
        return [Moved(1.0 - self.moved, self.task.slide.stem), self._whole_outcome(self.outcome)]

    @property
    def failed(self) -> bool:
        """As `Plan.failed`."""
        return self.outcome is not None and self.outcome.status == "failed"

    def _note(self, step: Step, result: StepResult) -> None:
        if step.kind == "begin":
            self.started_s = time.perf_counter()
            self.reason = result.outcome.reason
        self.seconds.update(result.outcome.stage_seconds)
        self.counted.update(result.counted)
        self.sources |= result.outcome.sources
        self.hashes = result.hashes or self.hashes

    def _whole_outcome(self, outcome: Outcome) -> Outcome:
        """The outcome of the last step with what all steps added up."""
        if not self.regions:  # one step did it all and counted for itself
            return outcome
        outcome.stage_seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        outcome.seconds = round(time.perf_counter() - self.started_s, 4)
        outcome.sources = self.sources
        outcome.counted = dict(self.counted)
        outcome.reason = outcome.reason or self.reason
        return outcome

    def _next(self, step: Step, result: StepResult) -> list[Step]:
        if step.kind == "begin":
            self.side_px, self.regions, self.have = result.side_px, result.regions, result.have
            self.folder = result.folder
            self.left = Counter({kind: len(self.regions) - len(self.have[kind]) for kind in _SHARES})
            self.left.update({kind: 1 - len(self.have[kind]) for kind in ("limits", "light", "tree")})
            self.left["hash"] = int(self.hashes is None)
            steps = [self._step("hash")] if self.left["hash"] else []
            return steps + self._enter("scan")
        self.left[step.kind] -= 1
        if self.left[step.kind]:
            return []
        after = {
            "scan": "limits",
            "limits": "edges",
            "edges": "light",
            "light": "plan",
            "plan": "tree",
            "tree": "tokens",
            "tokens": "write",
            "hash": "write",
        }
        return self._enter(after[step.kind])

    def _enter(self, kind: str) -> list[Step]:
        """Steps of a kind that are to do, or if none are, those of the kind after it."""
        order = ("scan", "limits", "edges", "light", "plan", "tree", "tokens", "write")
        for now in order[order.index(kind) :]:
            if now == "write":
                return [] if any(self.left.values()) else [self._step("write")]
            if self.left[now]:
                todo = [i for i in self.regions if i not in self.have[now]] if now in _SHARES else [0]
                return [self._step(now, i) for i in todo]
        raise AssertionError("unreachable")

    def _step(self, kind: str, index: int = 0) -> Step:
        joins = kind in ("limits", "light", "tree", "write")
        regions = self.regions if joins else ()
        hashes = self.hashes if kind == "write" else None
        return Step(kind, self.task, self.side_px, index, regions, hashes, self.folder)


def died(step: Step, cause: str) -> StepResult:
    """The result of a step whose worker died."""
    return StepResult(Outcome(step.task.slide.stem, str(step.task.slide), "failed", cause), ended=True)
