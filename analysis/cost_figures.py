"""Plots of what a token costs: time and Dice against tokens, preparation against training (matplotlib, no torch)."""

import numpy as np

from analysis.figure_style import COLUMN_IN, GREY, MOST_RUNS, PAGE_IN, Drawing, look, new_figure
from analysis.tables import Comparison


def against_tokens(comparison: Comparison) -> Drawing | None:
    """Draw seconds per image and Dice against tokens per image, adaptive and uniform runs told apart by shape."""
    shown = [g for g in comparison.groups if g.mean("tokens_per_image") and g.seconds_per_image][:MOST_RUNS]
    shown = [g for g in shown if g.first.model != "unet_tiled"]
    if len({g.mean("tokens_per_image") for g in shown}) < 2:
        return None
    figure = new_figure(PAGE_IN, 2.5)
    left, right = figure.subplots(1, 2)
    handles, names, words = [], [], []
    for i, group in enumerate(shown):
        kind, tokens = look(i), group.mean("tokens_per_image")
        seconds = [r.seconds_per_image for r in group.runs if r.seconds_per_image]
        marker = "o" if group.first.patching == "apf" else "s"
        left.plot([tokens] * 2, [min(seconds), max(seconds)], color=kind.colour, lw=1)
        mark = {"color": kind.colour, "ms": 5.5, "mec": "white", "mew": 0.6, "ls": "none"}
        (point,) = left.plot(tokens, np.mean(seconds), marker, **mark)
        handles.append(point)
        names.append(group.label)
        dice = group.mean("dice")
        if dice is not None:
            interval = group.dice_interval
            if interval:
                right.plot([tokens] * 2, interval, color=kind.colour, lw=1)
            right.plot(tokens, dice, marker, **mark)
        words.append(f"{group.label}: {tokens:,.0f} tokens, {np.mean(seconds):.3g} s per image")
    for axis in (left, right):
        axis.set(xlabel="tokens per image", xscale="log")
        axis.set_xticks(sorted({round(g.mean("tokens_per_image")) for g in shown}))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.minorticks_off()
    left.set(ylabel="training time per image (s)", yscale="log", title="(a) cost")
    left.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    right.set(ylabel="Dice, test slides", ylim=(-0.02, 1.02), title="(b) quality")
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    seeds = sorted({len(g.runs) for g in shown})
    caption = (
        "Training time per image and test Dice against tokens per image; circles: adaptive, squares: uniform. Lines: "
        f"range over seeds (n = {seeds[0]} to {seeds[-1]}) in (a), 95 % bootstrap interval over slides in (b)."
    )
    return Drawing("against_tokens", "Cost and Dice against tokens", caption, "Two scatter plots. " + "; ".join(words),
                   figure)  # fmt: skip


def preparation(comparison: Comparison) -> Drawing | None:
    """Draw the time of preparing one slide beside that of training on it, once and over the whole run."""
    shown = [g for g in comparison.groups if g.mean("preprocessing_seconds") and g.seconds_per_image][:MOST_RUNS]
    if not shown:
        return None
    figure = new_figure(COLUMN_IN * 1.25, 0.34 * len(shown) + 0.95)
    axis = figure.subplots()
    words, largest, smallest = [], 0.0, float("inf")
    for y, group in enumerate(shown):
        once = group.mean("preprocessing_seconds")
        whole = group.seconds_per_image * (group.mean("epochs") or 1)
        largest, smallest = max(largest, once, whole), min(smallest, once, whole)
        axis.plot([once, whole], [y, y], color=GREY, lw=0.8, zorder=1)
        axis.plot(once, y, "s", color=look(1).colour, ms=5)
        axis.plot(whole, y, "o", color=look(0).colour, ms=5.5)
        axis.annotate(f"{once:.3g} s, {once / whole:.1%}", (once, y), xytext=(0, 5), textcoords="offset points",
                      ha="center", fontsize=6)  # fmt: skip
        axis.annotate(f"{whole:.3g} s", (whole, y), xytext=(5, 0), textcoords="offset points", va="center",
                      fontsize=6)  # fmt: skip
        words.append(f"{group.label}: {once:.3g} s against {whole:.3g} s")
    axis.set_yticks(range(len(shown)), [g.label for g in shown])
    axis.set(xlabel="seconds per slide (log scale)", xscale="log", xlim=(smallest / 4, largest * 5))
    axis.set_ylim(len(shown) - 0.5, -0.6)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    caption = (
        "Preparing a slide once (squares, one core) against training on it over the whole run (circles, all GPUs of "
        "the run). A short training makes the share of the preparation look larger than a real one."
    )
    alt = "Two dots per run. " + "; ".join(words) + "."
    return Drawing("preparation", "Preparation against training", caption, alt, figure)
