"""Area under the ROC curve with bootstrap intervals, and broken down by finding.

Taha et al. (MICCAI 2022): percentile bootstrap of 10,000 resamples (table 3), finding types (table A1), finding sizes
(figure A2). Every breakdown sets some of the positives against all negatives.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.runs.stats import BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED

SIZE_THRESHOLDS_PX = (100, 150, 200, 250, 300, 350, 400)
LEVEL = 0.95
_DRAWS_AT_ONCE = 4_000_000  # items drawn per piece: bounds the memory to some 100 MB


@dataclass(frozen=True)
class AUC:
    """An area, or a difference of two, with the percentile interval of its resamples."""

    name: str  # which items
    value: float | None  # of the items themselves; None without positives or without negatives
    low: float | None  # ends of the interval; None where there is none
    high: float | None
    positives: int  # how many
    negatives: int


def auc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """The chance that a positive scores above a negative, ties counting one half (Mann-Whitney), exact.

    Args:
        scores: (N,) finite numbers.
        labels: (N,) 1 or true: positive.

    Returns:
        0..1, or None without positives or without negatives.

    Raises:
        ValueError: other lengths, or a score that is not finite.
    """
    groups, positive = _ranked(scores, labels)
    return _finite(_areas(_counts(groups, positive, np.arange(groups.size)[None]))[0])


def auc_interval(scores: ArrayLike, labels: ArrayLike, name: str = "all", resamples: int = BOOTSTRAP_RESAMPLES) -> AUC:
    """Area and its percentile interval; items (not classes) are drawn with replacement, the same at every call.

    Args:
        scores: (N,).
        labels: (N,).
        name: For the result.
        resamples: Resamples without positives or without negatives do not count.

    Returns:
        The area; its interval holds the middle 95 % of the resampled areas.

    Raises:
        ValueError: see `auc`.
    """
    groups, positive = _ranked(scores, labels)
    areas = [_areas(_counts(groups, positive, rows)) for rows in _draws(groups.size, resamples)]
    return _summary(name, auc(scores, labels), np.concatenate(areas or [np.empty(0)]), positive)


def auc_difference(
    scores: ArrayLike, baseline: ArrayLike, labels: ArrayLike, name: str = "all", resamples: int = BOOTSTRAP_RESAMPLES
) -> AUC:
    """Area of one model minus the area of another on the same (N,) items, resampled together (figure A2a).

    Raises:
        ValueError: see `auc`.
    """
    ours, positive = _ranked(scores, labels)
    theirs, _ = _ranked(baseline, labels)
    differences = [
        _areas(_counts(ours, positive, rows)) - _areas(_counts(theirs, positive, rows))
        for rows in _draws(ours.size, resamples)
    ]
    a, b = auc(scores, labels), auc(baseline, labels)
    value = None if a is None or b is None else a - b
    return _summary(name, value, np.concatenate(differences or [np.empty(0)]), positive)


# -- breakdowns: which items take part --------------------------------------------------------------------------------


def below_sizes(
    labels: ArrayLike, sizes_px: ArrayLike, thresholds: Sequence[float] = SIZE_THRESHOLDS_PX
) -> dict[str, NDArray[np.bool_]]:
    """Items of figure A2a, per threshold: the positives whose finding is smaller than it, and all negatives.

    Args:
        labels: (N,).
        sizes_px: (N,) square root of the area of the finding's box; nan where there is none.
        thresholds: Pixels.

    Returns:
        (N,) masks by name, `<100 px` and so on.
    """
    positive, sizes = _bool(labels), np.asarray(sizes_px, dtype=np.float64)
    return {f"<{limit:g} px": ~positive | (sizes < limit) for limit in thresholds}


def size_thirds(labels: ArrayLike, sizes_px: ArrayLike) -> dict[str, NDArray[np.bool_]]:
    """Items of figure A2b: the smallest, middle and largest third of the positives by size, each with all negatives.

    Positives without a size take no part. Equal sizes are told apart by their order, so that thirds are thirds.

    Args:
        labels: (N,).
        sizes_px: (N,), nan where there is none.

    Returns:
        (N,) masks by name: small, medium, large.
    """
    positive, sizes = _bool(labels), np.asarray(sizes_px, dtype=np.float64)
    sized = np.flatnonzero(positive & np.isfinite(sizes))
    order = sized[np.argsort(sizes[sized], kind="stable")]
    masks = {}
    for name, part in zip(("small", "medium", "large"), np.array_split(order, 3), strict=True):
        masks[name] = ~positive
        masks[name][part] = True
    return masks


def finding_types(labels: ArrayLike, types: Sequence[Collection[str]]) -> dict[str, NDArray[np.bool_]]:
    """Items of table A1, per finding type: the positives with that type, and all negatives.

    Returns:
        (N,) masks by type, in alphabetical order.
    """
    positive = _bool(labels)
    known = sorted({kind for kinds, on in zip(types, positive, strict=True) if on for kind in kinds})
    return {kind: ~positive | np.array([kind in kinds for kinds in types], dtype=bool) for kind in known}


def broken_down(
    scores: ArrayLike,
    labels: ArrayLike,
    masks: dict[str, NDArray[np.bool_]],
    baseline: ArrayLike | None = None,
    resamples: int = BOOTSTRAP_RESAMPLES,
) -> list[AUC]:
    """The area on each part of the (N,) items, or its difference from a baseline's area, with intervals."""
    ours, truth = np.asarray(scores), _bool(labels)
    theirs = None if baseline is None else np.asarray(baseline)
    return [
        auc_interval(ours[on], truth[on], name, resamples)
        if theirs is None
        else auc_difference(ours[on], theirs[on], truth[on], name, resamples)
        for name, on in masks.items()
    ]


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def _bool(labels: ArrayLike) -> NDArray[np.bool_]:
    given = np.asarray(labels)
    if given.ndim != 1 or not np.isin(given, (0, 1)).all():
        raise ValueError("labels must be a list of 0 and 1")
    return given.astype(bool)


def _ranked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Each item's group of equal scores, 0 the lowest, and whether it is positive."""
    given, positive = np.asarray(scores, dtype=np.float64), _bool(labels)
    if given.shape != positive.shape:
        raise ValueError(f"{given.size} scores do not go with {positive.size} labels")
    if not np.isfinite(given).all():
        raise ValueError("scores must be finite")
    return np.unique(given, return_inverse=True)[1].reshape(-1).astype(np.int64), positive


def _draws(items: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Pieces (r, items) of the resamples; seeded, so that models with the same items are resampled alike."""
    if items == 0:
        return
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    rows = max(1, _DRAWS_AT_ONCE // items)
    for first in range(0, resamples, rows):
        yield rng.integers(0, items, (min(rows, resamples - first), items))


def _counts(groups: NDArray[np.int64], positive: NDArray[np.bool_], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """(r, 2, G): how often each resample has a negative, a positive, of each group of equal scores."""
    size = int(groups.max()) + 1 if groups.size else 0
    cell = (positive * size + groups)[rows] + np.arange(len(rows))[:, None] * (2 * size)
    return np.bincount(cell.ravel(), minlength=len(rows) * 2 * size).reshape(len(rows), 2, size)


def _areas(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(r,) areas of (r, 2, G) counts, nan where a class is missing; integers until the last division."""
    negative, positive = counts[:, 0], counts[:, 1]
    below = np.cumsum(negative, axis=1) - negative
    won = (positive * (2 * below + negative)).sum(axis=1)
    pairs = negative.sum(axis=1) * positive.sum(axis=1)
    with np.errstate(invalid="ignore"):
        areas: NDArray[np.float64] = won / (2 * pairs)
    return areas


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _summary(name: str, value: float | None, resampled: NDArray[np.float64], positive: NDArray[np.bool_]) -> AUC:
    known = resampled[np.isfinite(resampled)]
    ends: tuple[float | None, float | None] = (None, None)
    if value is not None and known.size:
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        ends = (float(low), float(high))
    return AUC(name, value, *ends, int(positive.sum()), int((~positive).sum()))
