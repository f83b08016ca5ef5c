"""Plots of published numbers alone: cost and Dice against tokens, quality against cost.

Every caption says that the numbers are published; nothing here was measured by this suite.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import pandas as pd

from analysis.figures.uniform import published_against_uniform
from analysis.output.figure_style import GREY, PAGE_IN, Drawing, look, new_figure, plain_log, style
from analysis.papers.entries import REFERENCE, read_cells, table3, wide

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = {"APF-UNETR": ("o", "-"), "UNETR": ("s", "--")}
_SOURCE = "Published (APF, SC24, Table III; no measurement of this suite)"


@lru_cache(maxsize=1)
def draw_published() -> tuple[Drawing, ...]:
    """Return every figure that needs no runs."""
    return published_against_uniform(), published_tokens(), published_cost()


def _lines(axis: "Axes", x: str, y: str) -> list[str]:
    """Draw one line per resolution and model of Table III; return what stands in no line for lack of a number."""
    rows = _table3()
    known = rows.dropna(subset=[x, y])
    sizes = sorted(known.resolution.unique())
    for (resolution, model), points in known.groupby(["resolution", "model"], sort=False):
        marker, dash = _MARKS[model]
        colour = look(sizes.index(resolution)).colour
        places = points[[x, y]].sort_values([x, y]).to_numpy()
        axis.plot(*places.T, marker=marker, ls=dash, color=colour, ms=3.8, lw=0.9, mec="white", mew=0.4)
        if model == "APF-UNETR":  # said in words too, for print in grey
            above = len(places) == 1  # a lone point has its neighbour beside it
            axis.annotate(
                _size(resolution),
                places[-1],
                xytext=(0, 5) if above else (5, 0),
                fontsize=5.8,
                textcoords="offset points",
                ha="center" if above else "left",
                va="bottom" if above else "center",
                color=colour,
            )
    return [str(name) for name in rows.row[~rows.index.isin(known.index)]]


def _table3() -> pd.DataFrame:
    rows = wide(table3())
    return rows[rows.model.isin([*_MARKS])]


def _legend(figure: "Figure", axis: "Axes") -> None:
    """One key for colours (resolutions), and one for shapes (models)."""
    sizes = sorted({c.resolution for c in table3() if c.resolution})
    for i, size in enumerate(sizes):
        axis.plot([], [], color=look(i).colour, lw=2.4, label=_size(size))
    for model, (marker, dash) in _MARKS.items():
        axis.plot([], [], color=GREY, marker=marker, ls=dash, ms=4, label=model)
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=9, columnspacing=1.2, handlelength=2.0
    )


def _size(pixels: int) -> str:
    return f"{pixels // 1024}K" if pixels >= 1024 else f"{pixels} px"


def published_tokens() -> Drawing:
    """Draw Table III's seconds per image and Dice against the length of the sequence."""
    with style():
        figure = new_figure(PAGE_IN, 2.7)
        left, right = figure.subplots(1, 2)
        _lines(left, "tokens", "seconds_per_image")
        lost = _lines(right, "tokens", "dice")
        left.set(ylabel="time per image and GPU (s)", yscale="log", title="(a) cost")
        right.set(ylabel="Dice (%)", title="(b) quality")
        plain_log(left.yaxis)
        for axis in (left, right):
            axis.set(xlabel="tokens per image, L", xscale="log")
            axis.set_xlim(440, 26_000)
            axis.set_xticks([500, 1000, 2000, 4000, 8000, 16000])
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
            axis.minorticks_off()
        _legend(figure, left)
    caption = (
        f"{_SOURCE}: time per image and Dice of APF-UNETR and UNETR against the length of the sequence, by resolution. "
        f"n = 1 a point. Not drawn in (b), since their Dice is lost: {', '.join(lost)}.{_derived()}"
    )
    alt = f"Two line plots of Table III. {_extremes()}"
    return Drawing("published_tokens", "Cost and Dice against tokens (published)", caption, alt, figure)


def _derived() -> str:
    """Say which of the Dice values was not printed but follows from printed numbers."""
    found = [c.row for c in table3() if c.quantity == "dice" and c.model in _MARKS and c.status == "derived"]
    return f" Derived, not printed: the Dice of {', '.join(found)}." if found else ""


def _extremes() -> str:
    rows = _table3().sort_values("seconds_per_image", kind="stable").dropna(subset="seconds_per_image")
    low, high = rows.iloc[0], rows.loc[rows.seconds_per_image.idxmax()]
    return (
        f"From {low['row']} ({low['seconds_per_image']:g} s per image, L {low['tokens']:,.0f}) to {high['row']} "
        f"({high['seconds_per_image']:g} s, L {high['tokens']:,.0f})."
    )


def published_cost() -> Drawing:
    """Draw quality against cost: Dice of Table III against time, and top-1 of HIRI-ViT against arithmetic."""
    with style():
        figure = new_figure(PAGE_IN, 2.9)
        left, right = figure.subplots(1, 2)
        _lines(left, "seconds_per_image", "dice")
        left.set(xlabel="time per image and GPU (s)", xscale="log", ylabel="Dice (%)", title="(a) APF, Table III")
        left.set_xlim(0.045, 30)
        plain_log(left.xaxis)
        words = _hiri(right)
        _legend(figure, left)
    caption = (
        f"{_SOURCE.replace('Table III;', 'Table III; HIRI-ViT, TPAMI 2024, Table VII and Figure 1;')}: (a) Dice "
        "against time per image and GPU; the GPUs differ between points. (b) ImageNet top-1 accuracy against "
        f"multiply-accumulates; only rows whose two numbers are known. n = 1 a point.{_derived()}"
    )
    alt = "Line plot of Dice against time, and scatter plot of accuracy against arithmetic: " + "; ".join(words) + "."
    return Drawing("published_cost", "Quality against cost (published)", caption, alt, figure)


def _hiri(axis: "Axes") -> list[str]:
    rows = [wide(read_cells(REFERENCE / f"{stem}.csv")) for stem in ("hiri_table7", "hiri_text")]
    known = pd.concat(rows).dropna(subset=["top1", "gflops"]).sort_values(["gflops", "top1", "row"])
    ladder, others = (known[known.row.str.startswith(start)] for start in ("row ", "Swin"))
    words = []
    for name, these, i in (("HIRI-ViT-S, Table VII", ladder, 0), ("Swin, Figure 1", others, 1)):
        kind, points = look(i), list(zip(these.gflops, these.top1, these.row, strict=True))
        dash = kind.dash if these is others else "none"
        axis.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            marker=kind.marker,
            ls=dash,
            color=kind.colour,
            ms=4.5,
            label=name,
        )
        for cost, top1, row in points:
            short = " ".join(row.split()[:2])
            side = (-5, 0) if these is ladder and cost < 5 else (5, 0)
            axis.annotate(
                short,
                (cost, top1),
                xytext=side,
                textcoords="offset points",
                fontsize=6,
                va="center",
                ha="right" if side[0] < 0 else "left",
            )
            words.append(f"{row}: {top1} % at {cost} GMAC")
    axis.set(xlabel="cost (GMAC)", xscale="log", ylabel="ImageNet top-1 (%)", title="(b) HIRI-ViT")
    axis.set_xlim(3.3, 80)
    axis.set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
    axis.minorticks_off()
    axis.legend(loc="upper center", fontsize=6.5)
    return words
