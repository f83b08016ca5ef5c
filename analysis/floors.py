"""Scores that need no learning, collected from the records: all foreground, all background, Otsu (no matplotlib)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.groups import Group

LABELS = {"all_foreground": "all foreground", "all_background": "all background", "otsu": "Otsu threshold"}


@dataclass(frozen=True)
class Floor:
    """One floor: which, and its mean Dice on the cells of each run that has the same data."""

    name: str
    resolution: int | None
    n_test: int | None
    values: tuple[tuple[str, float], ...]  # (label of the run, Dice)

    @property
    def label(self) -> str:
        """The name for people."""
        return LABELS.get(self.name, self.name)

    @property
    def low(self) -> float:
        """The lowest value over the runs."""
        return min(dice for _, dice in self.values)

    @property
    def high(self) -> float:
        """The highest value over the runs: what a run has to pass."""
        return max(dice for _, dice in self.values)

    @property
    def text(self) -> str:
        """The Dice, or its range where the cells of the runs give values that print differently."""
        low, high = f"{self.low:.3f}", f"{self.high:.3f}"
        return low if low == high else f"{low} to {high}"


def find_floors(groups: Sequence[Group]) -> list[Floor]:
    """Return the floors once per data, each with its value for every run, in a fixed order."""
    alike: dict[tuple, list[Group]] = defaultdict(list)
    for group in groups:
        run = group.first
        names = [*LABELS, *sorted(set(run.floors) - set(LABELS))]
        data = run.split_sha256 or tuple(sorted(run.dice_per_slide))
        for name in run.floors:
            alike[(run.resolution or 0, str(data), names.index(name), name)].append(group)
    return [
        Floor(key[-1], key[0] or None, found[0].n_test, tuple((g.label, g.first.floors[key[-1]]) for g in found))
        for key, found in sorted(alike.items())
    ]
