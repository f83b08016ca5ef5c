"""What it costs to reach one validation quality: interpolated training curves, and their ratio.

APF (SC24), Table II and Section IV-F1, compares runs at the same Dice instead of the same number of epochs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from analysis.runs.run_files import Curve
from analysis.runs.stats import geomean

SHARES = (0.5, 0.75, 0.9, 1.0)  # of the best quality that all runs reach


@dataclass(frozen=True)
class Spent:
    """Training seconds or TFLOP until a quality is reached; `at_most` where the first evaluation already passed it."""

    amount: float
    at_most: bool = False


@dataclass(frozen=True)
class EqualQuality:
    """What two rows cost at one quality."""

    quality: float  # the validation quality that both reach
    a: float  # seconds or TFLOP of A, geometric mean over its seeds
    b: float  # the same of B
    speedup: float  # b / a: how many times less A needs
    low: float  # smallest b / a over pairs of seeds
    high: float  # largest
    unresolved: str  # "A", "B" or "A and B": whose first evaluation already passed the quality


def cost_at(spent: ArrayLike, quality: ArrayLike, target: float) -> Spent | None:
    """Return when a curve first reaches a quality, interpolated linearly in its best value so far.

    Args:
        spent: Training time, or arithmetic, until each evaluation, ascending.
        quality: What each evaluation found.
        target: The quality to reach.

    Returns:
        None where the curve never reaches it.
    """
    costs, best = np.asarray(spent, dtype=float), np.maximum.accumulate(np.asarray(quality, dtype=float))
    reached = np.flatnonzero(best >= target)
    if not reached.size:
        return None
    i = int(reached[0])
    if i == 0:
        return Spent(float(costs[0]), at_most=True)
    share = (target - best[i - 1]) / (best[i] - best[i - 1])
    return Spent(float(costs[i - 1] + share * (costs[i] - costs[i - 1])))


def equal_quality(
    a: Sequence[Curve],
    b: Sequence[Curve],
    shares: Sequence[float] = SHARES,
    of: Literal["val_seconds", "val_tflop"] = "val_seconds",
) -> list[EqualQuality]:
    """Return what A and B cost at shares of the best validation quality that every run of both reaches.

    Args:
        a: Curves of the seeds of A.
        b: Curves of the seeds of B.
        shares: Shares of the common best quality.
        of: The cost that is asked for; every curve must have it.

    Returns:
        One entry per share; none where a run has no evaluation, or the common best is 0.
    """
    curves = [*a, *b]
    if not a or not b or any(not c.val_dice.size for c in curves):
        return []
    common = min(float(c.val_dice.max()) for c in curves)
    if common <= 0:
        return []
    found = []
    for share in shares:
        sides = [[cost_at(getattr(c, of), c.val_dice, share * common) for c in side] for side in (a, b)]
        if any(cost is None or not cost.amount > 0 for side in sides for cost in side):
            continue  # a curve whose evaluations have no cost
        x, y = ([cost.amount for cost in side if cost] for side in sides)
        early = [name for name, side in zip("AB", sides, strict=True) if any(cost and cost.at_most for cost in side)]
        mean_a, mean_b = geomean(x), geomean(y)
        found.append(
            EqualQuality(
                share * common, mean_a, mean_b, mean_b / mean_a, min(y) / max(x), max(y) / min(x), " and ".join(early)
            )
        )
    return found


def label(value: EqualQuality) -> str:
    """Return the speedup as far as its bounds leave it: "2.3x", "at least 2.3x", "at most 2.3x" or "?"."""
    if value.unresolved == "A and B":
        return "?" if not math.isclose(value.speedup, 1) else "1.00x"
    sign = {"A": "at least ", "B": "at most "}.get(value.unresolved, "")
    return f"{sign}{value.speedup:.3g}x"
