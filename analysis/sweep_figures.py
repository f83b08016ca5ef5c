"""Sequence length against split value, as the paper's Figure 3, from token files (no torch; matplotlib when drawn)."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.cells import REFERENCE, read_cells
from analysis.figure_style import COLUMN_IN, GREY, Drawing, look, new_figure, save, style
from analysis.formats import Column, Table, markdown, number, whole
from launch.data import split_lengths


@dataclass(frozen=True)
class Sweep:
    """Lengths of one setting's token files: `lengths[v]` holds one number per slide."""

    resolution: int
    patch: int
    lengths: dict[int, np.ndarray]

    @property
    def values(self) -> np.ndarray:
        """Split values, ascending."""
        return np.array(sorted(self.lengths))

    def exponent(self, draws: int = 1000, seed: int = 0) -> tuple[float, float, float] | None:
        """Return b of L ~ v^b by least squares on logarithms, with a 95 % bootstrap interval over slides.

        None with fewer than two split values.
        """
        values = self.values
        if values.size < 2:
            return None
        x = np.log(values)
        rng = np.random.default_rng(seed)

        def slope(means: np.ndarray) -> float:
            return float(np.polyfit(x, np.log(means), 1)[0])

        own = slope(np.array([self.lengths[v].mean() for v in values]))
        drawn = []
        for _ in range(draws):
            means = []
            n = min(len(self.lengths[v]) for v in values)
            picks = rng.integers(n, size=n)
            for v in values:
                means.append(self.lengths[v][picks].mean())
            drawn.append(slope(np.array(means)))
        low, high = np.percentile(drawn, [2.5, 97.5])
        return own, float(low), float(high)


def read_sweeps(folders: list[Path]) -> list[Sweep]:
    """Return the token files of some folders by resolution and patch; only files built with --split-value count.

    Slides come in the order of their names, so that a bootstrap draws the same slides at every split value.

    Raises:
        ValueError: a folder cannot be read, or none of the files has a split value; the message names it.
    """
    found: dict[tuple[int, int], dict[int, dict[str, int]]] = {}
    for folder in folders:
        for resolution, patch, value, name, tokens in split_lengths(folder):
            found.setdefault((resolution, patch), {}).setdefault(value, {})[name] = tokens
    if not found:
        raise ValueError(f"{', '.join(map(str, folders))}: no token file built with --split-value")
    return [
        Sweep(r, p, {v: np.array([rows[n] for n in sorted(rows)]) for v, rows in by_value.items()})
        for (r, p), by_value in sorted(found.items())
    ]


def split_values(sweeps: list[Sweep]) -> Drawing:
    """Draw length against split value with the fitted exponent, the published means of 512 px beside."""
    with style():
        figure = new_figure(COLUMN_IN * 1.3, 2.7)
        axis = figure.subplots()
        words = []
        for i, sweep in enumerate(sweeps):
            kind, values = look(i), sweep.values
            means = np.array([sweep.lengths[v].mean() for v in values])
            low = [sweep.lengths[v].min() for v in values]
            high = [sweep.lengths[v].max() for v in values]
            fit = sweep.exponent()
            slides = min(len(sweep.lengths[v]) for v in values)
            label = f"{sweep.resolution:,} px, p={sweep.patch}, n={slides}"
            if fit is not None:
                label += f": L ~ v^{fit[0]:.2f} [{fit[1]:.2f}, {fit[2]:.2f}]"
            axis.fill_between(values, low, high, color=kind.colour, alpha=0.12, lw=0)
            axis.plot(values, means, color=kind.colour, marker=kind.marker, ls=kind.dash, ms=4, label=label)
            words.append(label)
        published = _published()
        axis.plot(published[:, 0], published[:, 1], "x", color=GREY, ms=5, label="published means, 512 px, 208 slides")
        axis.set(xlabel="split value v (edge pixels)", ylabel="tokens per image", xscale="log", yscale="log")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.set_xticks(sorted({int(v) for s in sweeps for v in s.values} | {20, 50, 100}))
        axis.minorticks_off()
        figure.legend(loc="outside lower center")
    caption = (
        "Tokens per image against the split value: means over slides, bands from the shortest to the longest sequence, "
        "least-squares exponents with 95 % bootstrap intervals over slides. Crosses: means the APF paper's Figure 3 is "
        "drawn from (published, other slides)."
    )
    return Drawing("split_values", "Sequence length against split value", caption, "; ".join(words), figure)


def _published() -> np.ndarray:
    """Split value and mean length of the paper's Figure 3, one row each."""
    rows: dict[str, dict[str, float]] = {}
    for cell in read_cells(REFERENCE / "apf_figure3.csv"):
        if cell.value is not None:
            rows.setdefault(cell.row, {})[cell.quantity] = cell.value
    pairs = [(r["split_value"], r["tokens"]) for r in rows.values() if "split_value" in r]
    return np.array(sorted(pairs))


def add_verb(verbs: Any) -> None:
    """Add `lengths` to the command line."""
    sub = verbs.add_parser(
        "lengths",
        help="sequence length against split value (Fig. 3), with growth exponents",
        description="Plot tokens per image against the split value of token files, one line per resolution and patch, "
        "with the growth exponent and its interval.",
        epilog="example: for v in 20 50 100; do python -m data_prep build IMAGES --out out/v$v --resolution 512 "
        "--patch 4 --split-value $v; done; python -m analysis lengths out/v20 out/v50 out/v100 --out out/plots",
    )  # fmt: skip
    sub.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders of token files")
    sub.add_argument("--out", type=Path, default=Path("plots"), metavar="DIR", help="default: plots")
    sub.set_defaults(run=run)


def run(args: argparse.Namespace) -> tuple[str, list[Path]]:
    """Return the table as text and the written files.

    Raises:
        ValueError: as `read_sweeps`, or the folder cannot be written.
    """
    sweeps = read_sweeps(args.folders)
    rows = []
    for sweep in sweeps:
        fit = sweep.exponent()
        for v in sweep.values:
            lengths = sweep.lengths[v]
            rows.append([whole(sweep.resolution), whole(sweep.patch), whole(int(v)), whole(len(lengths)),
                         number(float(lengths.mean()), 1), whole(int(lengths.min())), whole(int(lengths.max())),
                         None if fit is None else f"{fit[0]:.2f} [{fit[1]:.2f}, {fit[2]:.2f}]"])  # fmt: skip
    heads = ("R (px)", "p (px)", "split value", "slides", "mean L", "shortest", "longest", "exponent [95 % CI]")
    table = Table("Measured: tokens per image by split value.", [Column(h, True) for h in heads], rows,
                  ["run"] * len(rows), (), "lengths")  # fmt: skip
    return markdown(table) + "\n", save([split_values(sweeps)], args.out)
