"""Traces some steps with torch's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from launch.records.record import WARMUP_STEPS


class Profiler:
    """Traces `steps` steps after the warm-up of a start into `trace-rank-N.json`, which chrome://tracing reads."""

    def __init__(self, steps: int, logs: Path, rank: int) -> None:
        self._steps, self._path = steps, logs / f"trace-rank-{rank}.json"
        self._done = 0
        self._profile: Any = None

    def step(self) -> None:
        """A step was done."""
        self._done += 1
        if self._done == WARMUP_STEPS:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=kinds, record_shapes=True, profile_memory=True)
            self._profile.__enter__()
        elif self._done == WARMUP_STEPS + self._steps:
            self.close()

    def close(self) -> None:
        """Write the trace, also of fewer steps when the run ends early."""
        if self._profile is not None:
            running, self._profile = self._profile, None
            running.__exit__(None, None, None)
            running.export_chrome_trace(str(self._path))
