"""Training time and throughput of a run over all its starts.

Only steps count as training, not evaluation, checkpoints or start-up.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.records.record import WARMUP_STEPS


@dataclass
class Clock:
    """Rank 0's clock, saved with every checkpoint; the first steps of a start are not typical."""

    train_seconds: float = 0.0  # in steps since the run began
    timed_seconds: float = 0.0  # in typical steps, which count for throughput
    timed_images: float = 0.0  # frames' worth of pixels in typical steps, over all ranks
    timed_steps: int = 0  # typical steps
    _fresh: int = field(default=0, repr=False)
    _began_s: float = field(default=0.0, repr=False)
    _wait_s: float = field(default=0.0, repr=False)

    def begin(self) -> None:
        """A step begins."""
        self._began_s = time.perf_counter()

    def waited(self) -> None:
        """The batch of the step has come."""
        self._wait_s = time.perf_counter() - self._began_s

    def end(self, images: float, typical: bool = True) -> tuple[float, float]:
        """The step ends; returns its seconds and the percentage of them that it waited for the batch.

        `images` are the step's pixels in frames; `typical` is False for a step that did more than train.
        """
        seconds = time.perf_counter() - self._began_s
        self.train_seconds += seconds
        self._fresh += 1
        if self._fresh > WARMUP_STEPS and typical:
            self.timed_seconds += seconds
            self.timed_images += images
            self.timed_steps += 1
        return seconds, 100 * self._wait_s / seconds if seconds > 0 else 0.0

    @property
    def images_per_s(self) -> float | None:
        """Images per second over all ranks, or None when no step was timed."""
        return self.timed_images / self.timed_seconds if self.timed_seconds > 0 else None

    def notes(self) -> dict[str, Any]:
        """What a checkpoint keeps of the clock."""
        return {key: value for key, value in asdict(self).items() if not key.startswith("_")}
