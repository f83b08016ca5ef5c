"""Many slides to token files: which step of which slide comes when; log, progress and the last table.

The steps are done in this process, in a pool, or by MPI ranks. Must not import MPI (`comm` is an argument) or torch.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.build.log import NAME as LOG_NAME
from data_prep.build.log import (
    BuildLog,
    Hashes,
    SlideOutcome,
    SlideTask,
    Source,
    Step,
    StepResult,
    known_sources,
    read_log,
)
from data_prep.build.options import IN_MEMORY_PX, BuildOptions, OptionError
from data_prep.build.slide import build_one
from data_prep.parallel.queue import Queue, Schedule
from data_prep.system.files import remove_stale
from data_prep.system.progress import Progress, counted, format_duration
from data_prep.token_files.token_file import SUFFIX

_TABLE_ROWS = 60
_MOST_ACROSS = 64  # regions along a side: with more, what each costs besides its pixels is all there is
_KINDS = ("begin", "hash", "scan", "limits", "edges", "light", "plan", "tree", "tokens", "write")
_SHARES = {"scan": 0.6, "edges": 0.2, "plan": 0.05, "tokens": 0.15}  # of the work, for the progress bar


def prepare_out(folder: Path) -> list[Path]:
    """Make the folder of the token files, see that it can be written, and clear away what a killed run left.

    Returns:
        Temporary files that were removed.

    Raises:
        OptionError: The folder cannot be made or written.
    """
    probe = folder / ".write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another run into this folder may have been quicker
        return remove_stale(folder, [SUFFIX])
    except OSError as error:
        raise OptionError(f"--out {folder}: cannot be written ({error.strerror})") from error


def build(
    slides: Sequence[Path],
    options: BuildOptions,
    out: Path,
    *,
    jobs: int = 1,
    comm: Any = None,
    rebuild: bool = False,
) -> list[SlideOutcome]:
    """Build the token files of `slides` in `out`, which `prepare_out` has made. With `comm`, collective.

    The largest files are begun first, so that no rank is left alone with one at the end. Files have the same bytes
    whatever `jobs` and `comm`.

    Args:
        slides: Slide files with different stems.
        options: Parameters.
        out: Folder of the token files.
        jobs: Worker processes; 1 works in this process. Not with `comm`.
        comm: mpi4py communicator, or None.
        rebuild: Build also what is complete and valid.

    Returns:
        Outcomes sorted by slide; on ranks other than 0 an empty list.
    """
    rank = comm.rank if comm is not None else 0
    tasks = _tasks(slides, options, out, rebuild) if rank == 0 else []
    workers = comm.size if comm is not None else jobs
    queue = Schedule(SlidePlan(task, region_side(options, workers)) for task in tasks)
    log = BuildLog(out)
    outcomes: list[SlideOutcome] = []
    # Of a large slide one wants to see the parts.
    parts = 100 if region_side(options, workers) < options.resolution else 1
    unit = "slides" if parts == 1 else "% of a slide"
    with Progress(parts * len(slides), "build", unit, rank=rank) as progress:
        results = _results(queue, workers, comm, beat=partial(progress.update, 0))
        moved = 0.0
        try:
            for told in results:
                if isinstance(told, Moved):
                    before, moved = moved, moved + parts * told.by
                    progress.update(int(moved + 1e-6) - int(before + 1e-6), told.note)
                    continue
                outcomes.append(told)
                log.append(told.entry())
                for line in messages(told):
                    progress.write(line)
        finally:
            if comm is None:  # stop the workers now; ranks are stopped by whoever called
                results.close()
    if rank == 0:  # of a killed run whose last processes were still ending when this one began
        remove_stale(out, [SUFFIX])
    if log.error:
        progress.write(f"warning: the log could not be written, {log.error}")
    return sorted(outcomes, key=lambda outcome: outcome.slide)


def region_side(options: BuildOptions, workers: int) -> int:
    """Side of the regions of a frame in pixels, a power of two; the whole frame if it is built in one step.

    By default 8192 for frames of 32K and more and up to 16 workers, which decodes least twice; otherwise 4096, which
    shares better.

    Args:
        options: Parameters; `tile_px` decides if it is given.
        workers: Ranks or processes that may share one slide.
    """
    size_px = options.resolution
    if options.patching == "uniform":  # its tokens are the frame itself, there is nothing to save
        return size_px
    if options.tile_px is not None:
        least_px = max(options.patch, size_px // _MOST_ACROSS)
        return min(size_px, max(least_px, 1 << (options.tile_px.bit_length() - 1)))
    if size_px <= IN_MEMORY_PX:
        return size_px
    return max(options.patch, 8192 if size_px >= 32768 and workers <= 16 else 4096)


def run_step(step: Step, beat: Callable[[str], None] | None = None) -> StepResult:
    """Do one step; never raises for a bad slide.

    A frame of one region is done in its first step, unless an earlier build left results of regions that it may go on
    with.

    Args:
        step: The step.
        beat: Called with a note now and then while a frame of one region is built.
    """
    task = step.task
    if step.kind == "begin" and step.side_px >= task.options.resolution:
        if not any(path.name.startswith(f".{task.slide.stem}.") for path in task.out.glob(".*.work")):
            return StepResult(build_one(task, beat), ended=True)
    from data_prep.build import steps  # only large slides have any

    return steps.run_step(step, beat)


def _tasks(slides: Sequence[Path], options: BuildOptions, out: Path, rebuild: bool) -> list[SlideTask]:
    known: dict[str, dict[str, Source]] = defaultdict(dict)
    for path, source in known_sources(read_log(out)).items():
        known[Path(path).stem][path] = source
    largest_first = sorted(slides, key=lambda path: (-path.stat().st_size, path.name))
    return [SlideTask(path, out, options, known[path.stem], rebuild) for path in largest_first]


def _results(queue: Queue, workers: int, comm: Any, beat: Callable[[str], None]) -> Generator[Any, None, None]:
    if comm is not None and comm.size > 1:
        from data_prep.parallel.mpi import share

        return share(comm, run_step, queue, idle=lambda: beat(""))
    if workers > 1 and not queue.over:
        from data_prep.parallel.pool import run_pool

        return run_pool(run_step, queue, workers, died, idle=lambda: beat(""))
    return _alone(queue, beat)


def _alone(queue: Queue, beat: Callable[[str], None]) -> Generator[Any, None, None]:
    while not queue.over:
        step = queue.take()
        yield from queue.done(step, run_step(step, beat))


@dataclass
class Moved:
    """Progress of one slide, in slides."""

    by: float
    note: str


class SlidePlan:
    """The steps of one slide, for `data_prep.parallel.queue`: what is possible after what."""

    def __init__(self, task: SlideTask, side_px: int) -> None:
        self.task, self.side_px = task, side_px
        self.regions: tuple[int, ...] = ()
        self.have: dict[str, set[int]] = {}
        self.hashes: Hashes | None = None
        self.folder: Path | None = None
        self.left: Counter[str] = Counter()  # steps of a kind that are not done
        self.running = 0
        self.outcome: SlideOutcome | None = None  # of the slide, once it is known
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

    def _whole_outcome(self, outcome: SlideOutcome) -> SlideOutcome:
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
        return Step(kind, self.task, self.side_px, _KINDS.index(kind), index, regions, hashes, self.folder)


def died(step: Step, cause: str) -> StepResult:
    """The result of a step whose worker died."""
    return StepResult(SlideOutcome(step.task.slide.stem, str(step.task.slide), "failed", cause), ended=True)


def messages(outcome: SlideOutcome) -> list[str]:
    """Lines worth showing at once: failures, warnings, and why something was built again."""
    lines = [f"warning: {outcome.slide}: {text}" for text in outcome.warnings]
    if outcome.status == "failed":
        lines.append(f"failed: {outcome.slide}: {outcome.reason}")
    elif outcome.status == "done" and outcome.reason:
        lines.append(f"{outcome.slide}: {outcome.reason}")
    return lines


def summary(outcomes: Sequence[SlideOutcome], out: Path, seconds: float, unit: str = "slide") -> str:
    """The last table: every slide with what became of it; long runs show only failures and the first rows.

    Args:
        outcomes: Sorted as they shall appear.
        out: Where the files are.
        seconds: Wall-clock time of the run.
        unit: What one outcome is of.
    """
    shown = list(outcomes)
    if len(shown) > _TABLE_ROWS:
        shown = [o for o in outcomes if o.status == "failed" or o.warnings][:_TABLE_ROWS]
        shown += [o for o in outcomes if o.status != "failed" and not o.warnings][: _TABLE_ROWS - len(shown)]
    header = (unit, "status", "tokens", "ceiling", "seconds", "note")
    rows = [header, *(_row(outcome) for outcome in shown)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
    lines = []
    for row in rows:
        left = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}"
        numbers = "  ".join(f"{cell:>{width}}" for cell, width in zip(row[2:5], widths[2:], strict=True))
        lines.append(f"{left}  {numbers}  {row[5]}".rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    if len(shown) < len(outcomes):
        lines.append(f"... and {len(outcomes) - len(shown)} more, all in {out / LOG_NAME}")
    count = Counter(outcome.status for outcome in outcomes)
    of = counted(len(outcomes), unit)
    lines.append(
        f"{count['done']} done, {count['skipped']} skipped, {count['failed']} failed of {of} "
        f"in {format_duration(seconds) if seconds >= 60 else f'{seconds:.1f} s'} -> {out}"
    )
    return "\n".join(lines)


def _row(outcome: SlideOutcome) -> tuple[str, ...]:
    note = "; ".join(filter(None, [outcome.reason, *outcome.warnings]))
    return (
        outcome.slide,
        outcome.status,
        "" if outcome.tokens is None else str(outcome.tokens),
        "" if not outcome.ceiling else "/".join(f"{value:.3f}" for value in outcome.ceiling),
        f"{outcome.seconds:.2f}",
        note,
    )
