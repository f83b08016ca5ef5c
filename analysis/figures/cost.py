"""Plots of what a token costs: time and Dice against tokens, preparation against training."""

import numpy as np

from analysis.comparison.item_scores import interval, row_scores
from analysis.comparison.table import Comparison
from analysis.output.figure_style import (
    COLUMN_IN,
    GREY,
    MOST_RUNS,
    PAGE_IN,
    Drawing,
    between,
    legend_below,
    look,
    new_figure,
    plain_log,
)
from analysis.runs.records import Row


def against_tokens(comparison: Comparison) -> Drawing | None:
    """Draw seconds per image and Dice against tokens per image, adaptive and uniform runs told apart by shape."""
    shown = [r for r in comparison.rows if r.tokens_per_image and r.seconds_per_image][:MOST_RUNS]
    shown = [r for r in shown if r.model != "unet_tiled"]
    if len({r.tokens_per_image for r in shown}) < 2:
        return None
    figure = new_figure(PAGE_IN, 2.5)
    left, right = figure.subplots(1, 2)
    handles, names, words = [], [], []
    for i, row in enumerate(shown):
        kind, tokens = look(i), row.tokens_per_image
        seconds = [r.seconds_per_image for r in row.runs if r.seconds_per_image]
        marker = "o" if row.patching == "apf" else "s"
        left.plot([tokens] * 2, [min(seconds), max(seconds)], color=kind.colour, lw=1)
        mark = {"color": kind.colour, "ms": 5.5, "mec": "white", "mew": 0.6, "ls": "none"}
        (point,) = left.plot(tokens, np.mean(seconds), marker, **mark)
        handles.append(point)
        names.append(row.label)
        if row.dice is not None:
            if row.dice_interval:
                right.plot([tokens] * 2, row.dice_interval, color=kind.colour, lw=1)
            right.plot(tokens, row.dice, marker, **mark)
        words.append(f"{row.label}: {tokens:,.0f} tokens, {np.mean(seconds):.3g} s per image")
    for axis in (left, right):
        axis.set(xlabel="tokens per image", xscale="log")
        axis.set_xticks(sorted({round(r.tokens_per_image) for r in shown}))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.minorticks_off()
    left.set(ylabel="training time per image (s)", yscale="log", title="(a) cost")
    left.margins(y=0.12)
    plain_log(left.yaxis)
    right.set(ylabel="Dice, test slides", ylim=(-0.02, 1.02), title="(b) quality")
    legend_below(figure, handles, names)
    seeds = [len(r.runs) for r in shown]
    caption = (
        "Training time per image and test Dice against tokens per image; circles: adaptive, squares: uniform. Lines: "
        f"range over seeds ({between(seeds)}) in (a), 95 % bootstrap interval over slides in (b)."
    )
    return Drawing(
        "against_tokens", "Cost and Dice against tokens", caption, "Two scatter plots. " + "; ".join(words), figure
    )


def accuracy_against_cost(comparison: Comparison) -> Drawing | None:
    """Draw accuracy and AUC against training time per image, a panel each; None without a classification run."""
    shown = [r for r in comparison.rows if r.task == "classification" and r.seconds_per_image][:MOST_RUNS]
    scores = [name for name in ("accuracy", "auc") if any(getattr(r, name) is not None for r in shown)]
    if not scores:
        return None
    figure = new_figure(PAGE_IN if len(scores) > 1 else COLUMN_IN, 2.6)
    axes = figure.subplots(1, len(scores), squeeze=False)[0]
    handles: dict[str, object] = {}
    words = []
    for axis, name in zip(axes, scores, strict=True):
        for i, row in enumerate(shown):
            score = getattr(row, name)
            if score is None:
                continue
            kind, x = look(i), row.seconds_per_image
            ends = interval(name, row_scores(row))
            if ends and ends.low is not None and ends.high is not None and abs(ends.value - score) < 1e-4:
                axis.plot([x, x], [ends.low, ends.high], color=kind.colour, lw=1.1)
            (handles[row.label],) = axis.plot(x, score, kind.marker, color=kind.colour, ms=6, mec="white", mew=0.6)
            words.append(f"{row.label}: {_SCORES[name]} {score:.3f} at {x:.3g} s per image")
        axis.set(
            xlabel="training time per image (s, log scale)",
            xscale="log",
            ylabel=f"{_SCORES[name]}, test items",
            ylim=(-0.02, 1.04),
            title=_SCORES[name] if len(scores) > 1 else "",
        )
        axis.margins(x=0.2)
        plain_log(axis.xaxis)
    floors = [f for f in comparison.trivial if f.task == "classification"]
    for floor in floors if "accuracy" in scores else ():
        axes[0].axhline(floor.high, color=GREY, lw=0.7, ls=(0, (4, 2)), zorder=0)
    if "auc" in scores:
        axes[-1].axhline(0.5, color=GREY, lw=0.7, ls=(0, (4, 2)), zorder=0)
    legend_below(figure, list(handles.values()), list(handles), 4 if len(scores) > 1 else 2)
    caption = (
        f"Test scores of classifiers against end-to-end training time per image (n = {_items(shown)} items). Whiskers: "
        "95 % bootstrap interval over items. Dashed grey: scores without learning"
        + (f" ({floors[0].label})" if floors else "")
        + (", for AUC one half." if "auc" in scores else ".")
    )
    return Drawing(
        "accuracy_against_cost", "Accuracy against cost", caption, "Scatter plot. " + "; ".join(words) + ".", figure
    )


_SCORES = {"accuracy": "Accuracy", "auc": "AUC"}


def _items(rows: list[Row]) -> str:
    known = sorted({r.n_test for r in rows if r.n_test})
    return "unknown" if not known else f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}"


def _trained_on(rows: list[Row]) -> str:
    known = [r.n_train for r in rows if r.n_train]
    return f"{between(known)} training slides" if known else "number of slides not recorded"


def preparation(comparison: Comparison) -> Drawing | None:
    """Draw how long preparing one slide takes, beside training on it over the whole run."""
    shown = [r for r in comparison.rows if r.preprocessing_seconds and r.seconds_per_image][:MOST_RUNS]
    if not shown:
        return None
    longest = max(len(r.label) for r in shown)
    figure = new_figure(min(PAGE_IN, COLUMN_IN * 0.95 + 0.055 * longest), 0.34 * len(shown) + 0.95)
    axis = figure.subplots()
    words, largest, smallest = [], 0.0, float("inf")
    for y, row in enumerate(shown):
        once = row.preprocessing_seconds
        whole = row.seconds_per_image * (row.epochs or 1)
        largest, smallest = max(largest, once, whole), min(smallest, once, whole)
        axis.plot([once, whole], [y, y], color=GREY, lw=0.8, zorder=1)
        axis.plot(once, y, "s", color=look(1).colour, ms=5)
        axis.plot(whole, y, "o", color=look(0).colour, ms=5.5)
        axis.annotate(
            f"{once:.3g} s, {once / whole:.1%}",
            (once, y),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=6,
        )
        axis.annotate(f"{whole:.3g} s", (whole, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=6)
        words.append(f"{row.label}: {once:.3g} s against {whole:.3g} s")
    axis.set_yticks(range(len(shown)), [r.label for r in shown])
    axis.set(xlabel="seconds per slide (log scale)", xscale="log", xlim=(smallest / 4, largest * 5))
    axis.set_ylim(len(shown) - 0.5, -0.6)
    plain_log(axis.xaxis)
    caption = (
        "Preparing a slide once (squares, mean over the slides of the build log) against training on it over the whole "
        f"run (circles, all GPUs of the run; {_trained_on(shown)}). A short training makes the share of the "
        "preparation look larger than a real one."
    )
    alt = "Two dots per run. " + "; ".join(words) + "."
    return Drawing("preparation", "Preparation against training", caption, alt, figure)
