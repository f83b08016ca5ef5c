"""What a classifier said on each test item (scores.csv), and its accuracy and AUC with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.comparison.auc import auc_difference, auc_interval
from analysis.runs.records import Row
from analysis.runs.run_files import RunFiles
from analysis.runs.stats import bootstrap_interval


@dataclass(frozen=True)
class ItemScores:
    """What a classifier said on the test items, in the order of their names."""

    names: tuple[str, ...]  # Slides, pictures, or crops as slide@x,y
    labels: np.ndarray  # (N,) class of each item
    probabilities: np.ndarray  # (N, classes)

    @property
    def right(self) -> np.ndarray:
        """(N,) 1 where the likeliest class is right, else 0."""
        return np.asarray(self.probabilities.argmax(axis=1) == self.labels, np.float64)


def read_scores(files: RunFiles) -> ItemScores | None:
    """Return the test scores that a classification run left, or None where there are none, or broken ones."""
    try:
        rows = sorted((files.part("scores") or [])[1:], key=lambda row: row[0])
        names = tuple(row[0] for row in rows)
        labels = np.array([int(row[1]) for row in rows])
        probabilities = np.array([[float(p) for p in row[2:]] for row in rows])
    except (ValueError, IndexError):
        return None
    if probabilities.ndim != 2 or not np.isfinite(probabilities).all() or len(set(names)) < len(names):
        return None
    if not 0 <= labels.min() <= labels.max() < probabilities.shape[1]:
        return None
    return ItemScores(names, labels, probabilities)


def row_scores(row: Row) -> list[ItemScores]:
    """Return the test scores of all seeds of a row; none where one left none."""
    found = [read_scores(run.files) for run in row.runs]
    return [] if None in found else [scores for scores in found if scores is not None]


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % percentile bootstrap interval over n items; None where there is no interval."""

    value: float
    low: float | None
    high: float | None
    n: int


def interval(metric: str, a: Sequence[ItemScores], b: Sequence[ItemScores] = ()) -> Interval | None:
    """Return accuracy or AUC of A, or of A minus B on the same items, with its interval over items (HCT, Table 3).

    Both sides share the resamples, so the difference is paired. Accuracy is the mean over the seeds of a side. An AUC
    has an interval for two classes and one seed a side; more give None.

    Args:
        metric: "accuracy" or "auc".
        a: Scores of the seeds of A.
        b: Scores of the seeds of B; none for A alone.
    """
    sides = [list(side) for side in (a, b) if side]
    everything = [scores for side in sides for scores in side]
    if not a or any(s.names != a[0].names or (s.labels != a[0].labels).any() for s in everything):
        return None
    n = len(a[0].names)
    if metric == "accuracy":
        means = [np.mean([scores.right for scores in side], axis=0) for side in sides]
        values = means[0] - means[1] if b else means[0]
        low, high = bootstrap_interval(values.tolist()) or (None, None)
        return Interval(float(values.mean()), low, high, n)
    if any(len(side) > 1 or side[0].probabilities.shape[1] != 2 for side in sides):
        return None
    scores = [side[0].probabilities[:, 1] for side in sides]
    found = auc_difference(scores[0], scores[1], a[0].labels) if b else auc_interval(scores[0], a[0].labels)
    return None if found.value is None else Interval(found.value, found.low, found.high, n)
