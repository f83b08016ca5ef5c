"""One slide's task and what became of it, as `build`, its workers and its log hand them on. Imports no pixels."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.build.log import Source
from data_prep.build.options import BuildOptions

Hashes = tuple[str, str | None]  # of the slide and of its mask


@dataclass(frozen=True)
class Task:
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
class Outcome:
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


class Stage:
    """Adds the seconds of its block to `outcome.stage_seconds[name]`."""

    def __init__(self, outcome: Outcome, name: str) -> None:
        self.outcome, self.name = outcome, name

    def __enter__(self) -> None:
        self.started_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.outcome.stage_seconds[self.name] = round(time.perf_counter() - self.started_s, 4)
