"""Arithmetic on the numbers that APF prints: its speedups and gains, from the cells alone (no torch, no tables)."""

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.papers.entries import Cell
from analysis.runs.stats import geomean


def table2_speedups(cells: Sequence[Cell]) -> dict[int, float]:
    """Return, per resolution, the published seconds per image of UNETR divided by those of APF."""
    seconds = {(c.resolution, c.model): c.value for c in cells if c.quantity == "seconds_per_image" and c.value}
    return {r: seconds[r, "UNETR"] / seconds[r, "APF-UNETR"] for r in sorted({r for r, _ in seconds})}


def table2_geomean(cells: Sequence[Cell]) -> float:
    """Return the geometric mean of those speedups."""
    return geomean(table2_speedups(cells).values())


@dataclass(frozen=True)
class Gain:
    """The relative Dice gain that Table III states for a resolution, and what the printed cells give, in percent.

    `recomputed` is the gain over the row `base` that reproduces the stated one; `finest_gain` that over `finest_base`,
    the printed uniform row with the smallest patch.
    """

    resolution: int
    stated: float
    recomputed: float | None
    base: str | None
    finest_gain: float
    finest_base: str


def table3_gains(cells: Sequence[Cell]) -> list[Gain]:
    """Return each stated gain with the published UNETR row that reproduces it.

    The gain is 100 * (Dice of the finest APF / Dice of a UNETR row - 1). The paper does not say which row; the gain
    counts as reproduced when one published row gives it to the two printed decimals. `recomputed` and `base` are None
    otherwise.
    """
    gains = []
    for resolution in sorted({c.resolution for c in cells}):
        here = [c for c in cells if c.resolution == resolution]
        stated = next(c.value for c in here if c.quantity == "stated_gain")
        dice = [c for c in here if c.quantity == "dice" and c.status == "published"]
        finest = min((c for c in dice if c.model == "APF-UNETR"), key=lambda c: c.patch_px).value
        uniform = sorted((c for c in dice if c.model == "UNETR"), key=lambda c: c.patch_px)
        tries = [(100 * (finest / c.value - 1), c.row) for c in uniform]
        found = next(((g, row) for g, row in tries if abs(g - stated) < 0.0051), (None, None))
        gains.append(Gain(resolution, stated, *found, *tries[0]))
    return gains


def finest_time_ratios(three: Sequence[Cell]) -> dict[int, float]:
    """Return, per resolution, the time per image of Table III's finest UNETR over that of its finest APF."""
    finest: dict[tuple[int, str], Cell] = {}
    for cell in three:
        if cell.quantity == "seconds_per_image" and cell.patch_px and cell.resolution:
            key = (cell.resolution, cell.model)
            if key not in finest or cell.patch_px < (finest[key].patch_px or 0):
                finest[key] = cell
    sizes = sorted({r for r, _ in finest})
    return {r: (finest[r, "UNETR"].value or 0) / (finest[r, "APF-UNETR"].value or 1) for r in sizes}
