"""Adaptive against uniform patching over numbers of GPUs: seconds per image of both, and how many times faster."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.comparison.table import Comparison
from analysis.figures.scaling import dodged, log2_ticks, series_of, with_bars
from analysis.output.figure_style import (
    GREY,
    MOST_RUNS,
    PAGE_IN,
    Drawing,
    between,
    legend_below,
    look,
    new_figure,
    plain_log,
    style,
)
from analysis.papers.entries import table2, wide

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Rivals:
    """An adaptive training and its uniform rival on the same GPUs, at several numbers of them."""

    label: str  # of the adaptive training
    rival: str  # of the uniform one
    gpus: tuple[int, ...]  # ascending
    nodes: tuple[int | None, ...]  # of each number of GPUs; empty where they are not known
    adaptive: tuple[tuple[float, ...], ...]  # seconds per image of the seeds, for each number of GPUs
    uniform: tuple[tuple[float, ...], ...]  # the same of the uniform training
    words: tuple[str, ...] = ()  # said at each point

    @property
    def speedup(self) -> np.ndarray:
        """Mean seconds of uniform over mean seconds of adaptive."""
        pairs = zip(self.adaptive, self.uniform, strict=True)
        return np.array([np.mean(theirs) / np.mean(mine) for mine, theirs in pairs])

    @property
    def bars(self) -> np.ndarray:
        """(2, points) how far the speedup reaches below and above over pairs of seeds."""
        pairs = list(zip(self.adaptive, self.uniform, strict=True))
        low = np.array([min(theirs) / max(mine) for mine, theirs in pairs])
        high = np.array([max(theirs) / min(mine) for mine, theirs in pairs])
        return np.asarray(np.maximum(0, np.array([self.speedup - low, high - self.speedup])))


def rivals_of(comparison: Comparison) -> tuple[list[Rivals], int]:
    """Return every adaptive training with fair uniform rivals on two or more numbers of GPUs.

    The second value is the number of adaptive points that have no fair rival.
    """
    found, alone = [], 0
    for series in series_of(comparison.rows):
        if series.rows[0][0].patching != "apf":
            continue
        points = []
        for n, rows, seconds in zip(series.gpus, series.rows, series.seconds, strict=True):
            base = next((comparison.by_label[row.baseline] for row in rows if row.ratio is not None), None)
            theirs = tuple(r.seconds_per_image for r in base.runs if r.seconds_per_image) if base else ()
            if base and theirs:
                base_name = f"{base.experiment} ({base.patching}, {base.engine})"
                points.append((n, rows[0].nodes, seconds, theirs))
        alone += len(series.gpus) - len(points)
        if len(points) > 1:
            rival = f"{base_name}, {series.kind}"
            found.append(Rivals(f"{series.label}, {series.kind}", rival, *map(tuple, zip(*points, strict=True))))
    return found, alone


def measured_against_uniform(comparison: Comparison) -> Drawing | None:
    """Draw adaptive against uniform over numbers of GPUs, of trainings that ran on several; None without such."""
    every, alone = rivals_of(comparison)
    if not every:
        return None
    rivals = every[:MOST_RUNS]
    seeds = [len(s) for r in rivals for s in (*r.adaptive, *r.uniform)]
    left = f" {alone} adaptive points have no fair uniform rival and are not drawn." if alone else ""
    caption = (
        "Measured: adaptive patching (circles) against its fair uniform rival on the same GPUs (squares), and how many "
        f"times faster it is per image. Bars: range over seeds, and over pairs of them ({between(seeds)} a point)."
        + left
    )
    figure = _draw(rivals, "training time per image (s)")
    return Drawing("against_uniform", "Adaptive against uniform over GPUs (measured)", caption, _alt(rivals), figure)


def published_against_uniform() -> Drawing:
    """Draw Table II of the paper in the same way: every number of GPUs is another resolution there."""
    rows = wide(table2()).pivot(index="resolution", columns="model", values=["gpus", "seconds_per_image"])
    seconds = rows["seconds_per_image"]
    rivals = Rivals(
        "APF-UNETR, Table II",
        "UNETR, Table II",
        tuple(map(int, rows["gpus"]["APF-UNETR"])),
        (),
        tuple((s,) for s in seconds["APF-UNETR"]),
        tuple((s,) for s in seconds["UNETR"]),
        tuple(f"{r // 1024}K" if r >= 1024 else str(r) for r in rows.index),
    )
    caption = (
        "Published (APF, SC24, Table II; no measurement of this suite): seconds per image of APF-UNETR (circles) and "
        "UNETR (squares) and their ratio. The labels are the resolutions (px): each number of GPUs is another one, "
        "with other patches, so this is no scaling curve. n = 1 a point; the paper prints no spread."
    )
    figure = _draw([rivals], "time per image (s)")
    return Drawing(
        "published_against_uniform", "Adaptive against uniform over GPUs (published)", caption, _alt([rivals]), figure
    )


def _draw(rivals: Sequence[Rivals], cost: str) -> "Figure":
    with style():
        figure = new_figure(PAGE_IN, 2.7)
        left, right = figure.subplots(1, 2)
        for i, pair in enumerate(rivals):
            _pair(left, right, pair, i, len(rivals))
        right.axhline(1, color=GREY, lw=0.8, ls=(0, (2, 2)))
        counts = sorted({n for r in rivals for n in r.gpus})
        nodes = {n: k for r in rivals for n, k in zip(r.gpus, r.nodes, strict=False) if k}
        for axis in (left, right):
            log2_ticks(axis, counts)
            axis.set_xlabel("GPUs (nodes)" if nodes else "GPUs")
            if nodes:
                axis.set_xticks(counts, [f"{n:,}\n({nodes[n]:,})" if n in nodes else f"{n:,}" for n in counts])
        left.set(ylabel=cost, yscale="log", title="(a) cost of an image")
        plain_log(left.yaxis)
        right.set(ylabel="speedup over uniform (times)", title="(b) speedup at equal GPUs")
        right.set_ylim(0, 1.15 * max(float((r.speedup + r.bars[1]).max()) for r in rivals))
        handles, labels = left.get_legend_handles_labels()
        legend_below(figure, handles, labels, columns=2, long=2.6)
    return figure


def _pair(left: "Axes", right: "Axes", pair: Rivals, i: int, pairs: int) -> None:
    colour = look(i).colour
    shown = {"color": colour, "ms": 4}
    sides = ((pair.adaptive, "o", "-", pair.label), (pair.uniform, "s", "--", pair.rival))
    for k, (seconds, marker, dash, name) in enumerate(sides):
        n = dodged(pair.gpus, 2 * i + k, 2 * pairs)
        means = np.array([np.mean(s) for s in seconds])
        bars = np.array([[np.mean(s) - min(s), max(s) - np.mean(s)] for s in seconds]).T
        dash = "none" if pair.words else dash  # points of different problems make no line
        with_bars(left, n, means, bars, marker=marker, ls=dash, label=name, **shown)
    n = dodged(pair.gpus, i, pairs)
    with_bars(right, n, pair.speedup, pair.bars, marker="o", ls="none" if pair.words else "-", **shown)
    for x, y, word in zip(n, pair.speedup, pair.words, strict=False):
        right.annotate(word, (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=6.5)


def _alt(rivals: Sequence[Rivals]) -> str:
    said = [
        f"{r.label} against {r.rival}: "
        + ", ".join(f"{s:.2f} times faster on {n:,} GPUs" for n, s in zip(r.gpus, r.speedup, strict=True))
        for r in rivals
    ]
    return "Two line plots over numbers of GPUs. " + "; ".join(said) + "."
