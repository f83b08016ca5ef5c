"""Start and stop of the parts of a run as MLPerf's logging writes them, one line each; must not import torch."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Events:
    """`:::MLLOG {...}` lines with the keys and types of MLPerf's logging package, which its log checkers read.

    Args:
        path: File that lines are appended to; None writes nothing (ranks other than 0).
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def start(self, key: str, **metadata: Any) -> None:
        """The interval `key` begins: `key_start`."""
        self._write("INTERVAL_START", f"{key}_start", None, metadata)

    def stop(self, key: str, **metadata: Any) -> None:
        """The interval `key` ends: `key_stop`."""
        self._write("INTERVAL_END", f"{key}_stop", None, metadata)

    def point(self, key: str, value: Any, **metadata: Any) -> None:
        """A setting or a score."""
        self._write("POINT_IN_TIME", key, value, metadata)

    @contextlib.contextmanager
    def interval(self, key: str, **metadata: Any) -> Iterator[None]:
        """Start, and stop when the block ends in order."""
        self.start(key, **metadata)
        yield
        self.stop(key, **metadata)

    def _write(self, kind: str, key: str, value: Any, metadata: dict[str, Any]) -> None:
        if self._path is None:
            return
        line = {
            "namespace": "",
            "time_ms": time.time_ns() // 1_000_000,
            "event_type": kind,
            "key": key,
            "value": value,
            "metadata": metadata,
        }
        with contextlib.suppress(OSError), self._path.open("a") as log:  # a full disk: go on
            log.write(f":::MLLOG {json.dumps(line)}\n")
