"""Sequence length against split value and patch (the paper's Figure 3), from token files."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.output.figure_style import COLUMN_IN, GREY, PAGE_IN, Drawing, look, new_figure, plain_log, style
from analysis.papers.entries import REFERENCE, read_cells, wide
from launch.data.token_files import split_lengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Sweep:
    """Lengths of token files that differ in one setting only: `lengths[x]` holds one number per slide."""

    resolution: int  # R, px
    # the setting that all of them share: smallest patch p (px) where the split value varies, else split value
    fixed: int
    lengths: dict[int, np.ndarray]  # tokens of each slide by split value, or by smallest patch

    @property
    def values(self) -> np.ndarray:
        """Split values or patches, ascending."""
        return np.array(sorted(self.lengths))

    @property
    def slides(self) -> int:
        """How many slides every setting has."""
        return min(len(counts) for counts in self.lengths.values())

    def exponent(self, draws: int = 1000, seed: int = 0) -> tuple[float, float, float] | None:
        """Return b of L ~ x^b by least squares on logarithms, with a 95 % bootstrap interval over slides.

        None with fewer than two settings.
        """
        values = self.values
        if values.size < 2:
            return None
        x = np.log(values) - np.log(values).mean()
        table = np.array([self.lengths[v][: self.slides] for v in values], dtype=float)
        picks = np.random.default_rng(seed).integers(self.slides, size=(draws, self.slides))
        own, drawn = table.mean(axis=1), table[:, picks].mean(axis=2)  # (settings,), (settings, draws)
        slopes = x @ np.log(drawn) / (x @ x)
        low, high = np.percentile(slopes, [2.5, 97.5])
        return float(x @ np.log(own) / (x @ x)), float(low), float(high)


_COLUMNS = ["resolution", "patch", "split value", "slide", "tokens"]
SlideTokens = tuple[int, int, int, str, int]  # one slide at one setting: _COLUMNS


def read_rows(folders: list[Path]) -> list[SlideTokens]:
    """Return (resolution, patch, split value, slide, tokens) of every token file built with --split-value.

    Raises:
        ValueError: a folder cannot be read, or none of the files has a split value; the message names it.
    """
    rows = [row for folder in folders for row in split_lengths(folder)]
    if not rows:
        raise ValueError(f"{', '.join(map(str, folders))}: no token file built with --split-value")
    return rows


def by_split_value(rows: list[SlideTokens]) -> list[Sweep]:
    """Return one sweep over split values per resolution and patch."""
    return _sweeps(rows, "patch", "split value")


def by_patch(rows: list[SlideTokens]) -> list[Sweep]:
    """Return one sweep over smallest patches per resolution and split value."""
    return _sweeps(rows, "split value", "patch")


def _sweeps(rows: list[SlideTokens], fixed: str, varied: str) -> list[Sweep]:
    """Sweeps over one setting; slides that not every setting has are left out.

    Slides come in the order of their names, so that a bootstrap draws the same slides in every setting.
    """
    frame = pd.DataFrame(rows, columns=_COLUMNS).drop_duplicates(_COLUMNS[:-1], keep="last")
    found = []
    for (resolution, value), some in frame.groupby(["resolution", fixed]):
        tokens = some.pivot(index="slide", columns=varied, values="tokens").dropna().astype(int)
        if len(tokens):
            found.append(Sweep(resolution, value, {int(x): tokens[x].to_numpy() for x in tokens}))
    return found


def split_values(rows: list[SlideTokens]) -> Drawing:
    """Draw length against split value and, where patches vary, against the smallest patch, with fitted exponents."""
    left, right = by_split_value(rows), [s for s in by_patch(rows) if s.values.size > 1]
    with style():
        figure = new_figure(PAGE_IN if right else COLUMN_IN * 1.3, 3.0)
        axes = figure.subplots(1, 2 if right else 1, squeeze=False)[0]
        words = _panel(axes[0], left, "p={}", "v")
        published = _published()
        axes[0].plot(published[:, 0], published[:, 1], "x", color=GREY, ms=5, label="published means, 512 px, n=208")
        axes[0].set(
            xlabel="split value v (edge pixels)", ylabel="tokens per image", title="(a) split value" if right else ""
        )
        axes[0].set_xticks(sorted({int(v) for s in left for v in s.values} | {20, 50, 100}))
        if right:
            words += _panel(axes[1], right, "v={}", "p")
            _uniform_line(axes[1], right)
            axes[1].set(xlabel="smallest patch p (px)", title="(b) smallest patch")
            axes[1].set_xticks(sorted({int(v) for s in right for v in s.values}))
            axes[1].sharey(axes[0])
        for axis in axes:
            axis.minorticks_off()
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=6.2)
    caption = (
        "Tokens per image: means over slides (where there is one line, a band from the shortest to the longest "
        "sequence), least-squares exponents with 95 % bootstrap intervals over slides. Crosses: means the APF paper's "
        "Figure 3 is drawn from (published, other slides)."
        + (" Grey line: the slope of uniform patches, L = (R / p)^2." if right else "")
    )
    return Drawing("split_values", "Sequence length against split value and patch", caption, "; ".join(words), figure)


def _panel(axis: "Axes", sweeps: list[Sweep], fixed: str, symbol: str) -> list[str]:
    """Draw one line per sweep and return what each says."""
    words = []
    for i, sweep in enumerate(sweeps):
        kind, values = look(i), sweep.values
        counts = [sweep.lengths[v] for v in values]
        label = f"{sweep.resolution:,} px, {fixed.format(sweep.fixed)}, n={sweep.slides}"
        if (fit := sweep.exponent()) is not None:
            label += f": L ~ {symbol}^{fit[0]:.2f} [{fit[1]:.2f}, {fit[2]:.2f}]"
        if len(sweeps) == 1:  # bands of several lines hide each other; the table has their ends
            axis.fill_between(
                values, [c.min() for c in counts], [c.max() for c in counts], color=kind.colour, alpha=0.12, lw=0
            )
        axis.plot(
            values, [c.mean() for c in counts], color=kind.colour, marker=kind.marker, ls=kind.dash, ms=4, label=label
        )
        words.append(label)
    axis.set(xscale="log", yscale="log")
    plain_log(axis.yaxis, "{:,.0f}")
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    return words


def _uniform_line(axis: "Axes", sweeps: list[Sweep]) -> None:
    """The slope of equal patches, through the longest mean of the smallest patch."""
    first = min(int(s.values[0]) for s in sweeps)
    last = max(int(s.values[-1]) for s in sweeps)
    top = max(float(s.lengths[first].mean()) for s in sweeps if first in s.lengths)
    axis.plot(
        [first, last],
        [top, top * (first / last) ** 2],
        color=GREY,
        lw=0.8,
        ls=(0, (2, 2)),
        label="slope of uniform patches: p^-2",
    )


def _published() -> np.ndarray:
    """Split value and mean length of the paper's Figure 3, one row each."""
    rows = wide(read_cells(REFERENCE / "apf_figure3.csv")).dropna(subset=["split_value", "tokens"])
    return np.asarray(rows[["split_value", "tokens"]].sort_values("split_value"))
