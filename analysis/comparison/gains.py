"""`python -m analysis gains`: how much better one row is than others over several data sets.

The quantity is the paper's relative gain of Dice (APF, Table III): ratio of the mean Dice over the same test slides,
less 1, and its geometric mean over the data sets.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.comparison.pair import budget
from analysis.comparison.speedups import scored_elsewhere
from analysis.comparison.trivial_baselines import LABELS
from analysis.output.formats import Column, Table, number, significant
from analysis.runs.records import Row, RunsError, rows_of
from analysis.runs.stats import BOOTSTRAP_SEED, resamples


@dataclass(frozen=True)
class Gain:
    """A against B on the slides of one data set, or over all."""

    name: str  # data set; empty for the geometric mean over them
    a: float | None  # mean Dice of A; None over data sets
    b: float | None  # the same of B
    gain: float | None  # a / b - 1; None where B found nothing at all
    low: float | None  # lower end of the interval of the gain; None too for fewer than two slides
    high: float | None  # upper end
    n: int  # slides, or data sets
    better: int | None  # slides on which A is better
    note: str = ""  # what else to know


def gains(pairs: Sequence[tuple[str, Row, Row]]) -> list[Gain]:
    """Gains per data set, then the geometric mean over them if there are several.

    Args:
        pairs: (data set, A, B), each with at least one slide that both have.
    """
    rows, drawn = [], []
    for i, (name, a, b) in enumerate(pairs):
        row, ratios = _one(name, a, b, np.random.default_rng([BOOTSTRAP_SEED, i]))
        rows.append(row)
        drawn.append(ratios)
    if len(rows) < 2:
        return rows
    if any(row.gain is None for row in rows):
        why = ", ".join(row.name for row in rows if row.gain is None)
        return [*rows, Gain("", None, None, None, None, None, len(rows), None, f"no mean: B has a Dice of 0 on {why}")]
    with np.errstate(divide="ignore", invalid="ignore"):  # A may have found nothing: a mean of 0
        ratio = float(np.exp(np.mean(np.log([1 + row.gain for row in rows if row.gain is not None]))))
        fewest = min(map(len, drawn))  # sets of thousands of slides have fewer draws
        low, high = _ends(np.exp(np.mean(np.log([ratios[:fewest] for ratios in drawn]), axis=0)))
    return [*rows, Gain("", None, None, ratio - 1, low, high, len(rows), None)]


def _one(name: str, a: Row, b: Row, rng: np.random.Generator) -> tuple[Gain, np.ndarray]:
    """One data set, and the ratio of every resample."""
    mine, theirs = a.dice_per_slide, b.dice_per_slide
    shared = sorted(set(mine) & set(theirs))
    scores = [np.array([[run.dice_per_slide[s] for s in shared] for run in row.runs]) for row in (a, b)]
    values = [seeds.mean(0) for seeds in scores]
    x, y = (float(side.mean()) for side in values)
    n, draws = len(shared), resamples(len(shared))
    slides = rng.integers(0, n, (draws, 1, n))
    # Both rows share the drawn slides; each draws its own seeds.
    picked = [seeds[rng.integers(0, len(seeds), (draws, len(seeds), 1)), slides].mean((1, 2)) for seeds in scores]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = picked[0] / picked[1]
    low, high = _ends(ratios) if n > 1 and y > 0 else (None, None)
    left = len(set(mine) ^ set(theirs))
    notes = [f"{len(a.runs)} and {len(b.runs)} seeds"] if (len(a.runs), len(b.runs)) != (1, 1) else ["one seed"]
    notes += [f"{left} slides that only one has are left out"] if left else []
    notes += [_trained(a, b) or differ] if (differ := budget(a, b)) else []
    notes += [words for side, row, dice in (("A", a, x), ("B", b, y)) if (words := _no_better(side, row, dice))]
    better = int((values[0] > values[1]).sum())
    return Gain(name, x, y, x / y - 1 if y > 0 else None, low, high, n, better, "; ".join(notes)), ratios


def _trained(a: Row, b: Row) -> str:
    x, y = a.train_seconds, b.train_seconds
    return "" if x is None or y is None else f"trained for {significant(x)} and {significant(y)} s"


def _no_better(side: str, row: Row, dice: float) -> str:
    """Say that a row is not above its best trivial baseline; a gain over such a row means little."""
    floor = max((row.floors or {}).items(), key=lambda item: item[1], default=("", -1.0))
    return f"{side} is not above {LABELS.get(floor[0], floor[0])} ({floor[1]:.3f})" if dice <= floor[1] else ""


def _ends(ratios: np.ndarray) -> tuple[float | None, float | None]:
    """95 % interval of ratios, less 1; None for an end where B found nothing."""
    known = np.where(np.isnan(ratios), np.inf, ratios)
    low, high = np.sort(known)[[int(0.025 * (len(known) - 1)), math.ceil(0.975 * (len(known) - 1))]].tolist()
    return (low - 1 if math.isfinite(low) else None), (high - 1 if math.isfinite(high) else None)


class NoPairError(RunsError):
    """There is nothing to compare; its exit code is EX_NOINPUT of sysexits.h, which no crash has."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 66)


def find_pairs(
    rows: pd.DataFrame, a: str, b: str, refused: list[RunsError] | None = None
) -> list[tuple[str, Row, Row]]:
    """(data set, A, B) for two patterns with one * each, where both have runs with Dice per slide, in order of name.

    Args:
        rows: What `group_runs` made.
        a: Pattern of A.
        b: Pattern of B.
        refused: Gets what is wrong with a set, which is then left out; None: the first such set is an error.

    Raises:
        NoPairError: no set has both, nor was one refused.
        RunsError: a name stands for several rows of different settings, or two of a set were scored on other pixels.
    """
    sides = [_by_set(rows, pattern) for pattern in (a, b)]
    pairs, wrong = [], False
    for name in sorted(set(sides[0]) & set(sides[1])):
        try:
            one, other = (_only(side[name]) for side in sides)
            if set(one.dice_per_slide) & set(other.dice_per_slide):
                _check_pixels(one, other)
                pairs.append((name, one, other))
        except RunsError as error:
            if refused is None:
                raise
            refused.append(error)
            wrong = True
    if not pairs and not wrong:
        raise NoPairError(f"no data set has finished runs of both {a} and {b} on the same slides")
    return pairs


def _only(rows: list[Row]) -> Row:
    if len(rows) > 1:
        raise RunsError(f"{rows[0].experiment}: its runs have different settings, so they are no seeds of one row", 1)
    return rows[0]


def _check_pixels(one: Row, other: Row) -> None:
    if scored_elsewhere(one, other):
        why = "were scored on other pixels of the same slides, e.g. one inside a field of view"
        raise RunsError(f"{one.experiment} and {other.experiment} {why}", 1)


def _by_set(rows: pd.DataFrame, pattern: str) -> dict[str, list[Row]]:
    """Rows of a pattern by what its * stands for."""
    if pattern.count("*") != 1:
        raise ValueError(f"{pattern!r}: one * must stand for the data set, e.g. 'open_*_apf'")
    names = rows.experiment.str.extract("^" + re.escape(pattern).replace(r"\*", "(.+)") + "$", expand=False)
    return {str(name): rows_of(some) for name, some in rows.groupby(names)}


def gains_table(a: str, b: str, rows: Sequence[Gain]) -> Table:
    """The gains as a table."""
    heads = ("data set", "Dice A", "Dice B", "gain [95 % CI]", "n", "A better on", "remark")
    columns = [Column(head, head not in ("data set", "remark")) for head in heads]
    cells = [
        [
            row.name or "geometric mean",
            number(row.a),
            number(row.b),
            _gain(row),
            str(row.n),
            None if row.better is None else f"{row.better} of {row.n}",
            row.note or None,
        ]
        for row in rows
    ]
    return Table(
        f"Relative gain of Dice, A = {a} over B = {b}",
        columns,
        cells,
        ["run"] * len(cells),
        (
            "gain: mean Dice of A over that of B on the same test slides, less 1; the paper's Table III has 5.46 % on "
            "average.",
            "n: test slides, or data sets in the last row.",
            "interval: percentile bootstrap over the slides of every data set and the seeds of each row; a row of one "
            "seed adds nothing of what another seed would do.",
        ),
        slug="gains",
    )


def _gain(row: Gain) -> str | None:
    if row.gain is None:
        return None
    ends = [f"{100 * end:+.1f} %" if end is not None else "-" for end in (row.low, row.high)]
    return f"{100 * row.gain:+.1f} % [{', '.join(ends)}]"
