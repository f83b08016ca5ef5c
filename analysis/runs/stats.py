"""Small statistics of the tables: means, geometric means and seeded bootstrap intervals."""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

BOOTSTRAP_RESAMPLES = 10_000
BOOTSTRAP_SEED = 0
_MOST_CACHED_SLIDES = 2_000  # an index table of 10,000 x 2,000 int32 is 80 MB; more slides are drawn in pieces


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known, or None when none is."""
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None


def geomean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive values.

    Raises:
        ValueError: no value, or one that is not positive.
    """
    values = list(values)
    if not values or any(v <= 0 for v in values):
        raise ValueError(f"geomean needs positive values, got {values}")
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def resamples(n: int) -> int:
    """Return how many bootstrap resamples a mean over n items gets: fewer where many items make each one dear."""
    return BOOTSTRAP_RESAMPLES if n <= _MOST_CACHED_SLIDES else BOOTSTRAP_RESAMPLES // 10


@lru_cache(maxsize=8)
def _resamples(n: int) -> np.ndarray:
    """Return the (BOOTSTRAP_RESAMPLES, n) row numbers drawn with replacement, the same at every call."""
    return np.random.default_rng(BOOTSTRAP_SEED).integers(0, n, (BOOTSTRAP_RESAMPLES, n), dtype=np.int32)


def bootstrap_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of the mean over slides.

    The draws are seeded and depend on the number of slides only. Two runs on the same slides, in the same order, are
    resampled alike, and a table is the same whenever it is made.

    Args:
        values: one number per test slide.
        level: share of the resampled means inside the interval.

    Returns:
        (low, high), or None for fewer than two slides: one slide says nothing about the spread.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size < 2:
        return None
    if data.min() == data.max():  # summing equal numbers may round; a constant has no spread
        return float(data[0]), float(data[0])
    if data.size <= _MOST_CACHED_SLIDES:
        means = data[_resamples(data.size)].mean(axis=1)
    else:
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        means = np.array([data[rng.integers(0, data.size, data.size)].mean() for _ in range(resamples(data.size))])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
