"""Many slides to token files: in this process, in a pool, or shared over MPI ranks; log, progress and the last table.

Must not import MPI (`comm` is an argument) or torch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from data_prep.build.log import NAME as LOG_NAME
from data_prep.build.log import BuildLog, Source, known_sources, read_log
from data_prep.build.options import BuildOptions, OptionError
from data_prep.build.outcome import Outcome, Task
from data_prep.build.step_order import Moved, SlidePlan, died
from data_prep.build.steps import region_side, run_step
from data_prep.parallel.mpi import share
from data_prep.parallel.pool import run_pool
from data_prep.parallel.queue import Queue, Schedule
from data_prep.system.files import remove_stale
from data_prep.system.progress import Progress, counted, format_duration
from data_prep.token_files.token_file import SUFFIX

_TABLE_ROWS = 60


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
) -> list[Outcome]:
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
    outcomes: list[Outcome] = []
    # Of a large slide one wants to see the parts.
    parts = 100 if region_side(options, workers) < options.resolution else 1
    unit = "slides" if parts == 1 else "% of a slide"
    with Progress(parts * len(slides), "build", unit, rank=rank) as progress:
        results = _results(queue, workers, comm, beat=lambda note: progress.update(0, note))
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


def _tasks(slides: Sequence[Path], options: BuildOptions, out: Path, rebuild: bool) -> list[Task]:
    known: dict[str, dict[str, Source]] = defaultdict(dict)
    for path, source in known_sources(read_log(out)).items():
        known[Path(path).stem][path] = source
    largest_first = sorted(slides, key=lambda path: (-path.stat().st_size, path.name))
    return [Task(path, out, options, known[path.stem], rebuild) for path in largest_first]


def _results(queue: Queue, workers: int, comm: Any, beat: Callable[[str], None]) -> Generator[Any, None, None]:
    if comm is not None and comm.size > 1:
        return share(comm, run_step, queue, idle=lambda: beat(""))
    if workers > 1 and not queue.over:
        return run_pool(run_step, queue, workers, died, idle=lambda: beat(""))
    return _alone(queue, beat)


def _alone(queue: Queue, beat: Callable[[str], None]) -> Generator[Any, None, None]:
    while not queue.over:
        step = queue.take()
        yield from queue.done(step, run_step(step, beat))


def messages(outcome: Outcome) -> list[str]:
    """Lines worth showing at once: failures, warnings, and why something was built again."""
    lines = [f"warning: {outcome.slide}: {text}" for text in outcome.warnings]
    if outcome.status == "failed":
        lines.append(f"failed: {outcome.slide}: {outcome.reason}")
    elif outcome.status == "done" and outcome.reason:
        lines.append(f"{outcome.slide}: {outcome.reason}")
    return lines


def summary(outcomes: Sequence[Outcome], out: Path, seconds: float, unit: str = "slide") -> str:
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


def _row(outcome: Outcome) -> tuple[str, ...]:
    note = "; ".join(filter(None, [outcome.reason, *outcome.warnings]))
    return (
        outcome.slide,
        outcome.status,
        "" if outcome.tokens is None else str(outcome.tokens),
        "" if not outcome.ceiling else "/".join(f"{value:.3f}" for value in outcome.ceiling),
        f"{outcome.seconds:.2f}",
        note,
    )
