"""`build_log.jsonl`: what happened to each slide, one JSON line per slide and run, appended by one writer.

It also remembers the hash of each source with its size and times, so that a run that is started again need not read
terabytes only to find that nothing changed. Must not import OpenSlide or h5py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.system.files import sha256_of

NAME = "build_log.jsonl"


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


@dataclass(frozen=True)
class Source:
    """An input file as it was when it was read: a hash, and what `stat` said."""

    sha256: str
    stamp: tuple[int, int, int]


def stamp_of(path: Path) -> tuple[int, int, int]:
    """Size, modification and change time (ns): cannot all stay when the content changes on a running system."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def hash_source(path: Path, known: dict[str, Source]) -> Source:
    """Hash `path`, or take the hash known for the same path, size and times.

    Raises:
        OSError: The file cannot be read.
    """
    stamp = stamp_of(path)
    before = known.get(str(path.resolve()))
    if before is not None and before.stamp == stamp:
        return before
    return Source(sha256_of(path), stamp)


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
