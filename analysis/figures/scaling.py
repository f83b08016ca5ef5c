"""Plots of scaling: measured records over numbers of GPUs, and what the model predicts."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.output.figure_style import (
    COLOURS,
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
from analysis.runs.records import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.scaling.prediction import Prediction


@dataclass(frozen=True)
class Series:
    """One training on several numbers of GPUs."""

    label: str
    kind: str  # strong (same global batch) or weak (same batch per GPU)
    gpus: tuple[int, ...]  # ascending
    seconds: tuple[tuple[float, ...], ...]  # per image, of the seeds, for each number of GPUs
    rows: tuple[tuple[Row, ...], ...] = ()  # the rows behind each number of GPUs

    @property
    def mean(self) -> np.ndarray:
        """Mean seconds per image at each number of GPUs."""
        return np.array([np.mean(s) for s in self.seconds])

    @property
    def speedup(self) -> np.ndarray:
        """Images per second, where the smallest number of GPUs counts as itself."""
        return np.asarray(self.mean[0] / self.mean * self.gpus[0])

    @property
    def efficiency(self) -> np.ndarray:
        """Speedup over the number of GPUs."""
        return np.asarray(self.speedup / np.array(self.gpus))

    @property
    def bars(self) -> np.ndarray:
        """(2, points) how far the seeds' speedups reach below and above `speedup`; the first point's mean is fixed."""
        ends = [(self.mean[0] / max(s) * self.gpus[0], self.mean[0] / min(s) * self.gpus[0]) for s in self.seconds]
        low, high = np.array(ends).T
        return np.asarray(np.maximum(0, np.array([self.speedup - low, high - self.speedup])))


# What must be equal along a line; the rest of a label says what differs between lines of one experiment.
_SHAPE = (
    "experiment patching engine model decoder resolution patch length precision attention_backend device_name device "
    "split_sha256"
).split()
_SAID = {"patch": "p={}", "length": "L={}", "resolution": "{} px"}
_SAID |= dict.fromkeys(("decoder", "model", "precision", "device_name"), "{}")


def series_of(rows: Sequence[Row]) -> list[Series]:
    """Return the trainings among the rows that ran on two or more numbers of GPUs, by experiment and kind."""
    by_key: dict[tuple[object, ...], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if not (row.gpus and row.global_batch and row.seconds_per_image):
            continue
        shape = tuple(getattr(row, name) for name in _SHAPE)
        by_key[(*shape, "strong", row.global_batch)][row.gpus].append(row)
        by_key[(*shape, "weak", row.global_batch / row.gpus)][row.gpus].append(row)
    found = sorted(((key, members) for key, members in by_key.items() if len(members) > 1), key=lambda kv: str(kv[0]))
    out = []
    for key, members in found:
        counts = tuple(sorted(members))
        seconds = tuple(
            tuple(r.seconds_per_image for g in members[n] for r in g.runs if r.seconds_per_image) for n in counts
        )
        label = _label(key, [k for k, _ in found])
        out.append(Series(label, str(key[-2]), counts, seconds, tuple(tuple(members[n]) for n in counts)))
    return out


def _label(key: tuple[Any, ...], keys: Sequence[tuple[Any, ...]]) -> str:
    """The experiment, patching and engine of a line, and what sets it apart from others of that experiment."""
    alike = [k for k in keys if k[0] == key[0] and k[1] == key[1] and k[-2] == key[-2]]
    words = [str(key[1]), str(key[2])]
    for name, form in _SAID.items():
        at = _SHAPE.index(name)
        if len({k[at] for k in alike}) > 1:
            words.append(form.format(key[at]))
    if len({k[-1] for k in alike}) > 1:
        words.append(f"batch {key[-1]:g}" + (" a GPU" if key[-2] == "weak" else ""))
    return f"{key[0]} ({', '.join(words)})"


def log2_ticks(axis: "Axes", counts: Sequence[int]) -> None:
    """Give an axis of GPUs base-2 steps, at most five of them labelled, and room at both ends."""
    axis.set_xscale("log", base=2)
    ticks = sorted({2 ** round(math.log2(n)) for n in counts})
    axis.set_xticks(ticks[:: max(1, math.ceil(len(ticks) / 5))])
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axis.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.25)
    axis.minorticks_off()


def dodged(gpus: Sequence[int], i: int, lines: int) -> np.ndarray:
    """Numbers of GPUs moved aside by a little for the i-th line, so that bars at the same number do not hide."""
    return np.array(gpus, float) * 2 ** (0.05 * (i - (lines - 1) / 2))


def with_bars(axis: "Axes", x: np.ndarray, y: np.ndarray, bars: np.ndarray, **shown: Any) -> None:
    """Draw a line, with the (2, points) bars where there is any spread."""
    if np.max(bars, initial=0) > 0:
        axis.errorbar(x, y, yerr=bars, capsize=2, elinewidth=0.7, **shown)
    else:
        axis.plot(x, y, **shown)


def measured_scaling(rows: Sequence[Row]) -> Drawing | None:
    """Draw speedup, efficiency and seconds per image over GPUs of trainings that ran on several numbers of them."""
    found = series_of(rows)
    series = found[:MOST_RUNS]
    if not series:
        return None
    with style():
        figure = new_figure(PAGE_IN, 2.6)
        left, middle, right = figure.subplots(1, 3)
        counts = sorted({n for s in series for n in s.gpus})
        ideal = np.array([counts[0], counts[-1]], float)
        left.plot(ideal, ideal, color=GREY, lw=0.8, ls=(0, (2, 2)), label="ideal")
        middle.axhline(100, color=GREY, lw=0.8, ls=(0, (2, 2)))
        for i, s in enumerate(series):
            kind = look(i)
            shown = {"color": kind.colour, "marker": kind.marker, "ls": kind.dash, "ms": 3.4}
            n = dodged(s.gpus, i, len(series))
            with_bars(left, n, s.speedup, s.bars, label=f"{s.label}, {s.kind}", **shown)
            with_bars(middle, n, 100 * s.efficiency, 100 * s.bars / np.array(s.gpus), **shown)
            spread = np.array([[np.mean(x) - min(x), max(x) - np.mean(x)] for x in s.seconds]).T
            with_bars(right, n, s.mean, spread, **shown)
        left.set(xlabel="GPUs", ylabel="speedup", title="(a) speedup", yscale="log")
        left.set_yscale("log", base=2)
        left.yaxis.set_major_formatter(lambda y, _: f"{y:,.3g}")
        middle.set(xlabel="GPUs", ylabel="parallel efficiency (%)", title="(b) efficiency")
        middle.set_ylim(bottom=0)
        right.set(xlabel="GPUs", ylabel="seconds per image", title="(c) cost of an image", yscale="log")
        for axis in (left, middle, right):
            log2_ticks(axis, counts)
        plain_log(right.yaxis)
        handles, labels = left.get_legend_handles_labels()
        legend_below(figure, handles, labels, columns=3, long=2.6)
    seeds = [len(x) for s in series for x in s.seconds]
    caption = (
        "Measured scaling: images per second against the smallest number of GPUs (speedup), over the GPUs "
        f"(efficiency), and seconds per image; bars: range over seeds ({between(seeds)} a point). "
        "Strong: the same global batch; weak: the same batch per GPU. The dashed line is perfect scaling."
        + (f" {len(found) - MOST_RUNS} more are not drawn." if len(found) > MOST_RUNS else "")
    )
    ends = "; ".join(f"{s.label} {s.kind}: {100 * s.efficiency[-1]:.0f} % at {s.gpus[-1]} GPUs" for s in series)
    return Drawing("scaling_measured", "Measured scaling", caption, f"Three line plots over GPUs. {ends}.", figure)


def predicted_scaling(predictions: "Sequence[Prediction]", mode: str) -> Drawing:
    """Draw seconds per image and efficiency over GPUs as modelled, a row per site, and what a step consists of."""
    sites = list(dict.fromkeys(p.site for p in predictions))
    names = list(dict.fromkeys(p.experiment for p in predictions))
    counts = sorted({p.gpus for p in predictions})
    with style():
        figure = new_figure(PAGE_IN, 2.35 * len(sites) + 0.3)
        axes = figure.subplots(len(sites), 3, squeeze=False)
        for row, site in zip(axes, sites, strict=True):
            for i, name in enumerate(names):
                mine = [p for p in predictions if (p.site, p.experiment) == (site, name)]
                kind, n = look(i), [p.gpus for p in mine]
                shown = {"color": kind.colour, "marker": kind.marker, "ls": kind.dash, "ms": 3.0}
                row[0].plot(n, [p.seconds_per_image for p in mine], label=name, **shown)
                row[1].plot(n, [100 * p.efficiency for p in mine], **shown)
            _shares(row[2], [p for p in predictions if p.site == site and p.gpus == counts[-1]], names)
            row[0].set(xlabel="GPUs", ylabel="seconds per image", yscale="log", title=f"{site}: cost (modelled)")
            row[1].set(xlabel="GPUs", ylabel="efficiency (%)", title=f"{site}: efficiency (modelled)")
            row[1].set_ylim(bottom=0)
            plain_log(row[0].yaxis)
            for axis in row[:2]:
                log2_ticks(axis, counts)
        handles, labels = axes[0][0].get_legend_handles_labels()
        legend_below(figure, handles, labels, long=2.6)
    caption = (
        f"Modelled, not measured: {mode} scaling of {', '.join(names)} on {', '.join(sites)}; right, what a step "
        f"consists of on {counts[-1]:,} GPUs, from the left: {', '.join(predictions[0].parts)} (terms that take "
        "nothing are not seen). Factors are in the table of the fit."
    )
    best = [min((p for p in predictions if p.site == s), key=lambda p: p.seconds_per_image) for s in sites]
    alt = "Line plots over GPUs and stacked bars. " + " ".join(
        f"On {p.site} {p.experiment} takes {p.seconds_per_image:.2g} s per image on {p.gpus} GPUs." for p in best
    )
    return Drawing(f"scaling_{mode}", "Modelled scaling", caption, alt, figure)


def _shares(axis: "Axes", predictions: "Sequence[Prediction]", names: Sequence[str]) -> None:
    """Stacked bars: the share of each term, direct labels for those above a tenth."""
    hatches = ("", "//", "..", "xx", "\\\\", "--", "oo", "++", "**")
    for i, name in enumerate(names):
        p = next(p for p in predictions if p.experiment == name)
        start = 0.0
        for j, (term, seconds) in enumerate(p.parts.items()):
            share = 100 * seconds / p.step_s
            colour = (*COLOURS, "#8c6d31", GREY)[j]
            axis.barh(i, share, left=start, color=colour, hatch=hatches[j], edgecolor="white", lw=0.4, height=0.62)
            if share > 100 * 0.055 * len(term) / 2:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
                axis.text(start + share / 2, i, term, ha="center", va="center", fontsize=5.6, bbox=box)
            start += share
    axis.set_yticks(range(len(names)), [n.removeprefix("paip_") for n in names])
    axis.invert_yaxis()
    axis.set(xlabel="share of a step (%)", title="largest terms", xlim=(0, 100))
