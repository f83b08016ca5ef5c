"""What a build hands on: tasks, their steps, outcomes; and `build_log.jsonl`, one line per slide and run.

The log has one writer. It also remembers the hash of each source with its size and times, so that a run that is started
again need not read terabytes only to find that nothing changed. Must not import pixels, OpenSlide or h5py.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.build.options import BuildOptions
from data_prep.system.files import sha256_of

NAME = "build_log.jsonl"
Hashes = tuple[str, str | None]  # of the slide and of its mask


@dataclass(frozen=True)
class Source:
    """An input file as it was when it was read: a hash, and what `stat` said."""

    sha256: str
    stamp: tuple[int, int, int]


@dataclass(frozen=True)
class SlideTask:
    """One slide to build.

    Attributes:
        slide: The slide file.
        out: Folder of the token files.
        options: Parameters.
        known: Hashes of the slide and its mask from an earlier run, by resolved path.
        rebuild: Build even when a valid file is there.
    """

    slide: Path
    out: Path
    options: BuildOptions
    known: dict[str, Source] = field(default_factory=dict)
    rebuild: bool = False


@dataclass
class SlideOutcome:
    """What became of one slide: a line of `build_log.jsonl` and a row of the last table."""

    slide: str
    path: str
    status: Literal["done", "skipped", "failed"]
    reason: str = ""
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    tokens: int | None = None
    ceiling: list[float] | None = None
    edge_pixels: int | None = None
    damaged: list[dict[str, Any]] = field(default_factory=list)
    sources: dict[str, tuple[str, int, int, int]] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    traceback: str = ""

    def entry(self) -> dict[str, Any]:
        """As a log line, without empty fields that only failures and damaged slides have."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("traceback", "damaged")}


@dataclass(frozen=True)
class Step:
    """One step of one slide.

    Attributes:
        kind: begin, hash, scan, limits, edges, light, plan, tree, tokens or write.
        task: the slide and its parameters.
        side_px: side of the regions.
        stage: later ones have larger numbers.
        index: number of the region, row by row; 0 for steps of the slide.
        regions: all regions with content, for the steps that join them.
        hashes: of slide and mask, for `write`.
        folder: the slide's scratch folder, None before it has one.
    """

    kind: str
    task: SlideTask
    side_px: int
    stage: int = 0
    index: int = 0
    regions: tuple[int, ...] = ()
    hashes: Hashes | None = None
    folder: Path | None = None


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

    outcome: SlideOutcome
    ended: bool = False
    side_px: int = 0
    regions: tuple[int, ...] = ()
    have: dict[str, set[int]] = field(default_factory=dict)
    hashes: Hashes | None = None
    folder: Path | None = None
    counted: dict[str, int] = field(default_factory=dict)


class BuildLog:
    """Appends lines to `OUT/build_log.jsonl`; a full disk costs the line, not the build."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.error: str | None = None

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line. After a run that was killed inside a line, a new line is begun first."""
        try:
            with self.path.open("ab+") as out:
                if out.tell():
                    out.seek(-1, 2)
                    if out.read(1) != b"\n":
                        out.write(b"\n")
                out.write(json.dumps(entry).encode() + b"\n")
        except OSError as error:
            self.error = f"{self.path}: {error.strerror}"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of the log of `folder`, oldest first; empty when there is none that can be read."""
    try:
        text = (folder / NAME).read_text(errors="replace")
    except OSError:  # none yet, or none that can be read: hash again
        return []
    entries = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the line at which a run was killed
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def stamp_of(path: Path) -> tuple[int, int, int]:
    """Size, modification and change time (ns): cannot all stay when the content changes on a running system."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def hash_inputs(task: SlideTask, mask_paths: list[Path], outcome: SlideOutcome) -> Hashes:
    """SHA-256 of slide and mask (of several files, joined by +); also noted in `outcome.sources`.

    A file of which path, size and times are known from an earlier run is not read.

    Raises:
        OSError: A file cannot be read.
    """
    paths = [task.slide, *mask_paths]
    stamps = [stamp_of(path) for path in paths]
    hashes = []
    for path, stamp in zip(paths, stamps, strict=True):
        resolved = str(path.resolve())
        before = task.known.get(resolved)
        digest = before.sha256 if before is not None and before.stamp == stamp else sha256_of(path)
        outcome.sources[resolved] = (digest, *stamp)
        hashes.append(digest)
    return hashes[0], "+".join(hashes[1:]) or None


def known_sources(entries: list[dict[str, Any]]) -> dict[str, Source]:
    """Path -> hash, from log lines."""
    known = {}
    for entry in entries:
        try:
            for path, (digest, size, modified_ns, changed_ns) in entry.get("sources", {}).items():
                known[path] = Source(str(digest), (int(size), int(modified_ns), int(changed_ns)))
        except (AttributeError, TypeError, ValueError):  # edited by hand: hash again
            continue
    return known
