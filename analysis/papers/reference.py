"""Arithmetic on the numbers that APF prints: its speedups and gains, from the cells alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.papers.entries import Cell, wide
from analysis.runs.stats import geomean


def table2_speedups(cells: Sequence[Cell]) -> dict[int, float]:
    """Return, per resolution, the published seconds per image of UNETR over APF's."""
    seconds = wide(cells).pivot(index="resolution", columns="model", values="seconds_per_image")
    found: dict[int, float] = (seconds["UNETR"] / seconds["APF-UNETR"]).to_dict()
    return found


def table2_geomean(cells: Sequence[Cell]) -> float:
    """Return the geometric mean of Table II's speedups."""
    return geomean(table2_speedups(cells).values())


@dataclass(frozen=True)
class StatedGain:
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


def table3_gains(cells: Sequence[Cell]) -> list[StatedGain]:
    """Return each stated gain with the published UNETR row that reproduces it.

    The gain is 100 * (Dice of the finest APF / Dice of a UNETR row - 1). The paper does not say which row; the gain
    counts as reproduced when one published row gives it to the two printed decimals. `recomputed` and `base` are None
    otherwise.
    """
    stated = wide(cells).groupby("resolution").stated_gain.first()
    dice = wide(c for c in cells if c.quantity == "dice" and c.status == "published").sort_values("patch_px")
    gains = []
    for resolution, here in dice.groupby("resolution"):
        uniform = here[here.model == "UNETR"]
        found = 100 * (here[here.model == "APF-UNETR"].dice.iloc[0] / uniform.dice - 1)
        tries = list(zip(found, uniform.row, strict=True))
        said = float(stated[resolution])
        gain, base = next((t for t in tries if abs(t[0] - said) < 0.0051), (None, None))
        gains.append(StatedGain(resolution, said, gain, base, *tries[0]))
    return gains


def finest_time_ratios(cells: Sequence[Cell]) -> dict[int, float]:
    """Return, per resolution, Table III's time per image of the finest UNETR over the finest APF."""
    timed = wide(cells).dropna(subset=["seconds_per_image", "patch_px"]).sort_values("patch_px")
    finest = timed.groupby(["resolution", "model"]).seconds_per_image.first().unstack()
    ratios = (finest["UNETR"] / finest["APF-UNETR"]).dropna()
    return {int(resolution): float(ratio) for resolution, ratio in ratios.items()}
