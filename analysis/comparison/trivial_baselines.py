"""Scores that need no learning, collected from the records: Dice of three rules, or accuracy of one."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.runs.records import Row

LABELS = {
    "all_foreground": "all foreground",
    "all_background": "all background",
    "otsu": "Otsu threshold",
    "most_frequent_class": "most frequent class",
}


@dataclass(frozen=True)
class TrivialBaseline:
    """One rule without learning, and its score (Dice on cells, or accuracy) for each run on the same data."""

    name: str
    resolution: int | None
    n_test: int | None
    values: tuple[tuple[str, float], ...]  # (label of the run, score)
    task: str = "segmentation"

    @property
    def label(self) -> str:
        """The name for people."""
        return LABELS.get(self.name, self.name)

    @property
    def low(self) -> float:
        """The lowest value over the runs."""
        return min(score for _, score in self.values)

    @property
    def high(self) -> float:
        """The highest value over the runs: what a run has to pass."""
        return max(score for _, score in self.values)

    @property
    def text(self) -> str:
        """The score, or its range where the cells of the runs give values that print differently."""
        low, high = f"{self.low:.3f}", f"{self.high:.3f}"
        return low if low == high else f"{low} to {high}"


def find_trivial_baselines(rows: Sequence[Row]) -> list[TrivialBaseline]:
    """Return each trivial baseline once per data, with its value for every run, in a fixed order."""
    alike: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        names = [*LABELS, *sorted(set(row.floors or ()) - set(LABELS))]
        data = row.split_sha256 or tuple(sorted(row.runs[0].dice_per_slide or ()))
        for name in row.floors or ():
            alike[(row.task or "", row.resolution or 0, str(data), names.index(name), name)].append(row)
    return [
        TrivialBaseline(name, resolution or None, same[0].n_test, tuple((r.label, r.floors[name]) for r in same), task)
        for (task, resolution, _, _, name), same in sorted(alike.items())
    ]
