"""How many bytes this process may still use: machine memory and cgroup limits. Imports the standard library only."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Return the smallest of free machine memory and what the cgroups of this process leave, None if unknown.

    A job on a shared node usually sees the whole machine in /proc/meminfo, but is killed at its cgroup's limit.
    """
    known = [n for n in (_machine_available(), *_cgroup_rooms()) if n is not None]
    return max(0, min(known)) if known else None


def _machine_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _cgroup_rooms() -> list[int | None]:
    """Room under the limit of every memory cgroup from this process's own up to the root (v2 and v1)."""
    rooms: list[int | None] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return rooms
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            root, limit, used = _CGROUP, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = _CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / own.lstrip("/")
        while folder == root or root in folder.parents:
            rooms.append(_room(folder, limit, used))
            folder = folder.parent
    return rooms


def _room(folder: Path, limit: str, used: str) -> int | None:
    try:
        most = int((folder / limit).read_text())  # "max" is no number: no limit
        room = most - int((folder / used).read_text())
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):  # page cache is counted as used, but is given back on demand
                room += int(line.split()[1])
    except (OSError, ValueError):
        return None
    return room
