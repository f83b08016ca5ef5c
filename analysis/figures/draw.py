"""The plots of a folder of runs: curves, sequence lengths, Dice against cost, Dice per slide."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.comparison.table import Comparison
from analysis.figures.cost import accuracy_against_cost, against_tokens, preparation
from analysis.figures.panels import panels
from analysis.figures.scaling import measured_scaling
from analysis.figures.uniform import measured_against_uniform
from analysis.output.figure_style import (
    COLUMN_IN,
    GREY,
    MOST_RUNS,
    PAGE_IN,
    Drawing,
    Style,
    legend_below,
    look,
    new_figure,
    plain_log,
    spread,
    style,
)
from analysis.output.formats import whole
from analysis.runs.records import Row
from analysis.runs.run_files import Curve, Lengths, read_curve, read_lengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_all(comparison: Comparison) -> list[Drawing]:
    """Return every figure that the runs have data for; figures without data are left out."""
    with style():
        drawings = [
            dice_against_cost(comparison),
            accuracy_against_cost(comparison),
            against_tokens(comparison),
            measured_against_uniform(comparison),
            measured_scaling(comparison.rows),
            training_curves(comparison),
            dice_per_slide(comparison),
            sequence_lengths(comparison),
            preparation(comparison),
            panels(comparison),
        ]
    return [d for d in drawings if d is not None]


def _drawn(rows: list[Row]) -> tuple[list[Row], str]:
    """Return the rows that fit into one plot, and the sentence that says how many do not."""
    left = len(rows) - MOST_RUNS
    return rows[:MOST_RUNS], f" {left} more of {len(rows)} runs are in the table and not drawn." if left > 0 else ""


# ---- training curves


# What a validation curve is called in metrics.jsonl, and for people; the first that a task logged is drawn.
_QUALITIES = {"segmentation": ("dice",), "classification": ("auc", "accuracy")}
_NAMES = {"dice": "Dice", "auc": "AUC", "accuracy": "accuracy"}
_LOSSES = {"segmentation": "0.5 BCE + 0.5 Dice", "classification": "cross entropy"}


def training_curves(comparison: Comparison) -> Drawing | None:
    """Draw loss against step and against time, and the validation score against time, of all runs together.

    Runs of one score share a panel; a classifier's AUC is never drawn on the axis of a Dice.
    """
    rows, left_out = _drawn(comparison.rows)
    curves = [(i, r, _curves_of(r)) for i, r in enumerate(rows)]
    curves = [entry for entry in curves if entry[2]]
    if not curves:
        return None
    scores = [name for name in _NAMES if any(q == name and c.val_dice.size for _, _, cs in curves for q, c in cs)]
    figure = new_figure(PAGE_IN, 2.45)
    axes = figure.subplots(1, 2 + len(scores))
    handles = []
    for i, _, of_group in curves:
        for quality, curve in of_group:
            line = _loss_lines(axes[0], axes[1], curve, i)
            if curve.val_dice.size:
                kind = look(i)
                axes[2 + scores.index(quality)].plot(
                    curve.val_seconds,
                    curve.val_dice,
                    color=kind.colour,
                    ls=kind.dash,
                    marker=kind.marker,
                    ms=3.2,
                    mew=0,
                )
        handles.append(line)
    axes[0].set(xlabel="optimiser step", ylabel="training loss", title="(a) loss by step", xscale="log")
    plain_log(axes[0].xaxis, "{:,.0f}")
    axes[1].set(xlabel="training time (s)", ylabel="training loss", title="(b) loss by time")
    for letter, axis, quality in zip("cdef", axes[2:], scores, strict=False):
        name = _NAMES[quality]
        axis.set(xlabel="training time (s)", ylabel=f"{name}, validation", title=f"({letter}) validation {name}")
        axis.set_ylim(bottom=-0.02 if quality == "dice" else None)
    for axis in axes[1:]:
        axis.set_xlim(left=0)
    legend_below(figure, handles, [g.label for _, g, _ in curves], 4, long=2.6)
    names = ", ".join(g.label for _, g, _ in curves)
    tasks = sorted({g.task or "" for _, g, _ in curves}, reverse=True)
    losses = "; ".join(f"{task}: {_LOSSES[task]}" for task in tasks if task in _LOSSES)
    scored = f" and {' and '.join(_NAMES[q] for q in scores)} on the validation items" if scores else ""
    caption = (
        f"Training loss ({losses}){scored} of all runs. Faint lines: loss of every step; strong lines: "
        "running mean over 5 % of the run. "
        "Training time counts optimiser steps only, no evaluation." + left_out
    )
    return Drawing("training_curves", "Training curves", caption, _curves_alt(curves, names), figure)


def _curves_of(row: Row) -> list[tuple[str, Curve]]:
    """The curves of all seeds, each with the first quality of its task that was logged."""
    found = []
    for run in row.runs:
        tried = [(q, read_curve(run.files, q)) for q in _QUALITIES.get(run.task or "", ("dice",))]
        known = [(q, c) for q, c in tried if c is not None]
        if known:
            found.append(next(((q, c) for q, c in known if c.val_dice.size), known[0]))
    return found


def _curves_alt(curves: list[tuple[int, Row, list[tuple[str, Curve]]]], names: str) -> str:
    ends = [
        f"{g.label} ends at loss {np.mean([_smooth(c.loss)[-1] for _, c in cs if c.loss.size]):.2f}"
        for _, g, cs in curves
        if any(c.loss.size for _, c in cs)
    ]
    return f"Line plots of training loss and validation score of {names}. " + "; ".join(ends) + "."


def _loss_lines(by_step: "Axes", by_time: "Axes", curve: Curve, i: int) -> Any:
    kind = look(i)
    smooth = _smooth(curve.loss)
    line = None
    for axis, x in ((by_step, curve.step), (by_time, curve.seconds)):
        axis.plot(x, curve.loss, color=kind.colour, lw=0.4, alpha=0.25, rasterized=curve.loss.size > 5000)
        (line,) = axis.plot(x, smooth, color=kind.colour, ls=kind.dash)
    return line


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the running mean over the last 5 % of the points (fewer at the start), as long as the input."""
    window = max(1, round(values.size * 0.05))
    total = np.concatenate(([0.0], np.cumsum(values)))
    end = np.arange(1, values.size + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


# ---- sequence lengths


def sequence_lengths(comparison: Comparison) -> Drawing | None:
    """Draw how many tokens each slide has, one line per set of token files; equal counts become a bar that says so."""
    rows, left_out = _drawn(comparison.rows)
    sets = read_lengths(rows)
    if not sets:
        return None
    figure = new_figure(COLUMN_IN, 0.55 + 0.36 * len(sets))
    axis = figure.subplots()
    words = []
    high = max(s.counts[-1] for s in sets)
    for y, lengths in enumerate(sets):
        words.append(_length_row(axis, y, lengths))
    axis.set(
        yticks=range(len(sets)),
        yticklabels=[s.label for s in sets],
        xscale="log",
        xlabel="tokens per slide (log scale)",
        ylim=(len(sets) - 0.5, -0.5),
        xlim=(1, high * 9),
    )
    axis.tick_params(axis="y", length=0)
    plain_log(axis.xaxis, "{:,.0f}")
    alt = "Tokens per slide: " + "; ".join(f"{s.label}: {w}" for s, w in zip(sets, words, strict=True)) + "."
    caption = (
        "Sequence length of every slide, by set of token files. A bar: all slides have the same length. "
        "Dots: one per slide; tick: median." + left_out
    )
    return Drawing("sequence_lengths", "Sequence lengths", caption, alt, figure)


def _length_row(axis: "Axes", y: int, lengths: Lengths) -> str:
    counts, n = lengths.counts, lengths.counts.size
    colour = look(0).colour if lengths.label.startswith("apf") else look(1).colour
    if lengths.source != "build log":
        axis.barh(y, counts[0], height=0.5, color=colour, alpha=0.35, hatch="///", edgecolor="white")
        text = f"{counts[0]:,.0f} on average (record)"
    elif counts[0] == counts[-1]:
        axis.barh(y, counts[0], height=0.5, color=colour, alpha=0.75)
        text = f"{counts[0]:,} on all {n} slides" if n > 1 else f"{counts[0]:,} on the one slide"
    else:
        rng = np.random.default_rng(0)
        axis.plot(
            counts, y + rng.uniform(-0.22, 0.22, n), "o", ms=2.4, mew=0, color=colour, alpha=0.6, rasterized=n > 2000
        )
        axis.plot([np.median(counts)] * 2, [y - 0.34, y + 0.34], color="black", lw=1.4)
        text = f"{counts[0]:,} to {counts[-1]:,}, median {np.median(counts):,.0f}, n={n}"
    axis.annotate(text, (counts[-1], y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=6.5)
    return text


# ---- Dice against cost


def dice_against_cost(comparison: Comparison) -> Drawing | None:
    """Draw test Dice against seconds per image, with each run's ceiling, and trivial baselines as lines."""
    rows, left_out = _drawn(comparison.rows)
    shown = [(i, r) for i, r in enumerate(rows) if r.dice is not None and r.seconds_per_image]
    if not shown:
        return None
    figure = new_figure(COLUMN_IN, 2.75)
    axis = figure.subplots()
    handles, words = [], []
    for i, row in shown:
        handles.append(_cost_point(axis, row, i))
        words.append(f"{row.label}: Dice {row.dice:.3f} at {row.seconds_per_image:.3g} s per image")
    ceilings = any(r.dice_ceiling is not None for _, r in shown)
    costs = [g.seconds_per_image for _, g in shown]
    axis.set(
        xscale="log",
        xlabel="training time per image (s, log scale)",
        ylabel=f"Dice, test slides{_n_text([g for _, g in shown])}",
        ylim=(-0.02, 1.04),
        xlim=(min(costs) / 1.7, max(costs) * 1.7),
    )
    plain_log(axis.xaxis, "{:g}")
    floors = _trivial_lines(axis, comparison)
    legend_below(figure, handles, [g.label for _, g in shown], 2)
    caption = (
        "Test Dice against end-to-end training time per image. Whiskers: 95 % bootstrap interval over test slides. "
        + ("Short bars joined by dots: ceiling of the run's cells. " if ceilings else "")
        + floors
        + left_out
    )
    return Drawing("dice_against_cost", "Dice against cost", caption, "Scatter plot. " + "; ".join(words) + ".", figure)


def _cost_point(axis: "Axes", row: Row, i: int) -> Any:
    kind, x, y = look(i), row.seconds_per_image, row.dice
    interval = row.dice_interval
    if interval:
        axis.plot([x, x], interval, color=kind.colour, lw=1.1, zorder=2)
    ceiling = row.dice_ceiling
    if ceiling is not None:
        axis.plot([x], [ceiling], "_", color=kind.colour, ms=11, mew=1.6, zorder=2)
        axis.plot(
            [x, x], [interval[1] if interval else y, ceiling], ":", color=kind.colour, lw=0.7, alpha=0.8, zorder=1
        )
    (point,) = axis.plot([x], [y], kind.marker, color=kind.colour, ms=6, mec="white", mew=0.6, zorder=3, ls="none")
    return point


def _trivial_lines(axis: "Axes", comparison: Comparison) -> str:
    """Draw the Dice of trivial baselines and return the sentence about them; more than six lines are not drawn.

    With several resolutions or test sets, the name of a line says which one it belongs to.
    """
    floors = [f for f in comparison.trivial if f.task == "segmentation"]
    alike = Counter(f.name for f in floors)
    if not floors or len(floors) > 6:
        return "" if not floors else f"The {len(floors)} floors of these data sets are in the table. "
    places = spread([f.high for f in floors], 0.052)
    for floor, place in zip(floors, places, strict=True):
        name = floor.label
        if alike[floor.name] > 1:
            name += f", {whole(floor.resolution) or '?'} px, n={floor.n_test or '?'}"
        axis.axhline(floor.high, color=GREY, lw=0.7, ls=(0, (4, 2)), zorder=0)
        axis.annotate(
            name,
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(2, 0),
            textcoords="offset points",
            va="center",
            fontsize=6.3,
            color=GREY,
        )
    return "Dashed grey: floors, which need no learning (where the runs of one data set differ, the highest)."


def _n_text(groups: list[Row]) -> str:
    """Return the number of test slides for an axis label, a range where runs differ."""
    known = sorted({g.n_test for g in groups if g.n_test})
    if not known:
        return ""
    return f" (n={known[0]})" if len(known) == 1 else f" (n={known[0]} to {known[-1]})"


# ---- Dice per slide


def dice_per_slide(comparison: Comparison) -> Drawing | None:
    """Draw each run's Dice on each test slide in one column per slide, and the means with intervals beside them."""
    rows, left_out = _drawn(comparison.rows)
    shown = [(i, r) for i, r in enumerate(rows) if r.dice_per_slide]
    if not shown:
        return None
    stems = sorted({s for _, g in shown for s in g.dice_per_slide})
    average = {s: np.mean([g.dice_per_slide[s] for _, g in shown if s in g.dice_per_slide]) for s in stems}
    stems.sort(key=lambda s: (average[s], s))
    many = len(stems) > 40
    figure = new_figure(PAGE_IN if len(stems) > 14 else COLUMN_IN * 1.25, 2.6)
    axis, means = figure.subplots(1, 2, sharey=True, width_ratios=(max(4, min(14, len(stems))), 1.6))
    handles = []
    for x, stem in enumerate(stems):
        values = [g.dice_per_slide[stem] for _, g in shown if stem in g.dice_per_slide]
        axis.plot([x, x], [min(values), max(values)], color="#c8c8c8", lw=0.8, zorder=1)
    for k, (i, group) in enumerate(shown):
        kind = look(i)
        # Side by side by a little, so that equal scores do not hide each other.
        aside = 0 if many else 0.3 * ((k + 0.5) / len(shown) - 0.5)
        xs = [x + aside for x, s in enumerate(stems) if s in group.dice_per_slide]
        ys = [group.dice_per_slide[s] for s in stems if s in group.dice_per_slide]
        (dots,) = axis.plot(
            xs, ys, kind.marker, color=kind.colour, ms=2.5 if many else 4.6, mec="white", mew=0.4, ls="none", zorder=2
        )
        handles.append(dots)
        _mean_column(means, group, k, kind)
    axis.set(
        ylim=(-0.03, 1.03),
        ylabel="Dice",
        xlim=(-0.6, len(stems) - 0.4),
        xlabel=f"test slides (n={len(stems)}), by mean Dice",
    )
    if many:
        axis.set_xticks([])
    else:
        long = max(map(len, stems)) * len(stems) > 48
        axis.set_xticks(range(len(stems)), stems, rotation=60 if long else 0, ha="right" if long else "center")
    means.set(xticks=[], xlim=(-0.8, len(shown) - 0.2), xlabel="mean,\n95 % CI")
    means.tick_params(axis="y", length=0)
    legend_below(figure, handles, [g.label for _, g in shown], 4 if len(stems) > 14 else 2)
    words = "; ".join(
        f"{g.label}: {min(g.dice_per_slide.values()):.2f} to {max(g.dice_per_slide.values()):.2f}" for _, g in shown
    )
    caption = (
        "Dice on each test slide; a grey line joins the runs on one slide. Right: mean and 95 % bootstrap interval."
        + left_out
    )
    return Drawing(
        "dice_per_slide", "Dice on each test slide", caption, f"Dot plot of Dice per test slide. {words}.", figure
    )


def _mean_column(axis: "Axes", group: Row, k: int, kind: Style) -> None:
    mean, interval = float(np.mean(list(group.dice_per_slide.values()))), group.dice_interval
    if interval:
        axis.plot([k, k], interval, color=kind.colour, lw=1.1)
    axis.plot([k], [mean], kind.marker, color=kind.colour, ms=5, mec="white", mew=0.5)
