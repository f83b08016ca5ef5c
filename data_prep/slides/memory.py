"""How much memory this process may still use; refuses in advance what needs more."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from data_prep.slides.base import SlideError

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Return the smaller of free machine memory and room under this process's cgroup limits, None if unknown.

    A job on a shared node usually sees the whole machine in /proc/meminfo, but is killed at its cgroup's limit.
    """
    known = [n for n in (_machine_available(), *_cgroup_rooms()) if n is not None]
    return max(0, min(known)) if known else None


def _machine_available() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cgroup_rooms() -> list[int | None]:
    """Room under every memory cgroup from this process's own up to the root (v2 and v1)."""
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


def check_decoded_size(path: Path, need_bytes: int, what: str, max_raster_gib: float | None = None) -> None:
    """Refuse an image (`what`, of `need_bytes` once decoded) that would not fit in memory, before anything is decoded.

    The limit is `max_raster_gib`, else the environment variable APF_MAX_RASTER_GIB, else the available memory.

    Raises:
        SlideError: it is larger than the limit, or the variable is no positive number.
    """
    limit, source = available_bytes(), "of memory available"
    if max_raster_gib is not None:
        limit, source = int(max_raster_gib * 2**30), "allowed"
    elif text := os.environ.get("APF_MAX_RASTER_GIB"):
        gib = -1.0
        with suppress(ValueError):
            gib = float(text)
        if not gib > 0:
            raise SlideError(f"{path}: APF_MAX_RASTER_GIB={text!r} is not a positive number of GiB")
        limit, source = int(gib * 2**30), "allowed by APF_MAX_RASTER_GIB"
    if limit is not None and need_bytes > limit:
        raise SlideError(
            f"{path}: {what} need {need_bytes / 2**30:.1f} GiB decoded, more than the {limit / 2**30:.1f} GiB {source};"
            " convert it to a tiled TIFF"
        )


def check_memory(error: BaseException, need_bytes: int) -> None:
    """Tell damage from a lack of memory when a tile could not be decoded.

    A damaged header can ask for any size, so a MemoryError may mean damage. If even a sound tile does not fit, the
    machine is to blame, and readable pixels must not be taken for damaged ones.

    Raises:
        MemoryError: `error` is one, and `need_bytes` cannot be had either.
    """
    if isinstance(error, MemoryError):
        np.empty(need_bytes, np.uint8)


def check_tokens_fit(path: Path, count: int, patch_px: int, classes: int, remedy: str) -> None:
    """Refuse tokens that would not fit in memory, before they are made: a slide's tokens are written in one go.

    `classes` are the foreground classes that are counted (0 without a mask); `remedy` says what would need less.

    Raises:
        SlideError: they need more than the available memory.
    """
    need_bytes, limit = count * patch_px**2 * (3 + 4 + 4 * classes), available_bytes()
    if limit is not None and need_bytes > limit:
        raise SlideError(
            f"{path}: {count} tokens of {patch_px} x {patch_px} pixels need {need_bytes / 2**30:.1f} GiB, more than "
            f"the {limit / 2**30:.1f} GiB of memory available; {remedy}"
        )
