"""Pictures side by side: image, truth and the prediction of each run for several test slides."""

from typing import TYPE_CHECKING

import numpy as np

from analysis.comparison.table import Comparison
from analysis.output.figure_style import COLOURS, PAGE_IN, Drawing, new_figure
from analysis.runs.records import Row
from analysis.runs.run_files import Pictures, RunFiles, picture_stems, read_pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_SLIDES = 4
MOST_COLUMNS = 5
TRUTH, PREDICTED = COLOURS[1], COLOURS[0]  # vermillion contour over a blue fill
_SIDE_PX = 430  # longest side of a picture in the figure: about 300 dpi at its width


def panels(comparison: Comparison) -> Drawing | None:
    """Draw image, truth and every run's prediction for up to four test slides.

    A rule chooses the slides: evenly over the ranks of the mean Dice over the runs, worst and best included.
    """
    groups = [r for r in comparison.rows if picture_stems(_files(r))][:MOST_COLUMNS]
    if not groups:
        return None
    stems = _choose(groups)
    rows = [(stem, [read_pictures(_files(g), stem) for g in groups]) for stem in stems]
    rows = [(stem, pictures) for stem, pictures in rows if any(pictures)]
    if not rows:
        return None
    columns = 2 + len(groups)
    side = PAGE_IN / columns
    figure = new_figure(PAGE_IN, side * len(rows) + 0.3)
    figure.set_layout_engine("constrained", w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (stem, pictures) in zip(axes, rows, strict=True):
        _draw_row(line, stem, pictures, groups)
    heads = ["image", "truth", *(_wrap(g.label) for g in groups)]
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(head, fontsize=7, pad=3)
    total = sum(bool(picture_stems(_files(r))) for r in comparison.rows)
    left = f" The first {MOST_COLUMNS} of {total} runs." if total > MOST_COLUMNS else ""
    seeds = " Runs with several seeds show the first." if any(len(g.runs) > 1 for g in groups) else ""
    caption = (
        "Test slides at even ranks of the mean Dice over the runs, worst first. Blue: predicted; orange outline: "
        "truth; grey: what the run saw. Number: Dice of the run on the whole slide, or inside its field of view."
        f"{seeds}{left}"
    )
    alt = "Grid of pictures. " + "; ".join(_words(stem, groups) for stem, _ in rows) + "."
    return Drawing("predictions", "Predictions side by side", caption, alt, figure, photographic=True)


def _files(row: Row) -> RunFiles:
    """The files of the first seed, whose pictures are shown."""
    files: RunFiles = row.runs[0].files
    return files


def _dice(row: Row) -> dict[str, float]:
    return row.runs[0].dice_per_slide or {}


def _words(stem: str, groups: list[Row]) -> str:
    scores = ", ".join(f"{g.label} {_dice(g)[stem]:.2f}" for g in groups if stem in _dice(g))
    return f"slide {stem}: Dice {scores}" if scores else f"slide {stem}"


def _choose(groups: list[Row]) -> list[str]:
    """Return up to four slides that all runs have (or else any run has), evenly over the ranks of their mean Dice."""
    sets = [picture_stems(_files(g)) for g in groups]
    stems = sorted(set.intersection(*sets) or set.union(*sets))

    def score(stem: str) -> float:
        known = [_dice(g)[stem] for g in groups if stem in _dice(g)]
        return float(np.mean(known)) if known else 0.0

    stems.sort(key=lambda s: (score(s), s))
    picks = np.unique(np.linspace(0, len(stems) - 1, min(MOST_SLIDES, len(stems))).round().astype(int))
    return [stems[i] for i in picks]


def _draw_row(axes: "list[Axes]", stem: str, pictures: list[Pictures | None], groups: list[Row]) -> None:
    # Uniform files keep every pixel; an adaptive run's picture shows its large leaves at their coarse cells.
    by_detail = sorted(zip(groups, pictures, strict=True), key=lambda gp: gp[0].patching != "uniform")
    shown = _shrink(next(p for _, p in by_detail if p is not None))
    axes[0].imshow(shown.image, interpolation="antialiased")
    axes[0].set_ylabel(stem, fontsize=7)
    _overlay(axes[1], shown, shown.truth, fill=False)
    for axis, picture, group in zip(axes[2:], pictures, groups, strict=True):
        if picture is None:
            axis.text(0.5, 0.5, "no picture", ha="center", va="center", transform=axis.transAxes)
        else:
            small = _shrink(picture)
            _overlay(axis, small, small.prediction, fill=True)
        dice = _dice(group).get(stem)
        if dice is not None:
            box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.2}
            axis.text(0.03, 0.04, f"{dice:.2f}", transform=axis.transAxes, fontsize=7, bbox=box, va="bottom")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)


def _overlay(axis: "Axes", pictures: Pictures, area: np.ndarray, fill: bool) -> None:
    """Show the picture in pale grey, an area filled, and the outline of the truth over it."""
    grey = pictures.image.mean(axis=2, keepdims=True)
    base = np.repeat(110 + grey * (145 / 255), 3, axis=2)
    if fill:
        colour = np.array([int(PREDICTED[i : i + 2], 16) for i in (1, 3, 5)], dtype=float)
        base = np.where(area[..., None], 0.42 * base + 0.58 * colour, base)
    else:
        base = pictures.image
    axis.imshow(base.clip(0, 255).astype(np.uint8), interpolation="antialiased")
    if pictures.truth.any() and not pictures.truth.all():
        # Padding by one pixel closes the outline where the truth touches the border.
        padded = np.pad(pictures.truth.astype(float), 1)
        h, w = pictures.truth.shape
        x, y = np.arange(-1, w + 1), np.arange(-1, h + 1)
        for width, line in ((1.9, "white"), (0.9, TRUTH)):
            axis.contour(x, y, padded, levels=[0.5], colors=[line], linewidths=width)
    axis.set(xlim=(-0.5, pictures.truth.shape[1] - 0.5), ylim=(pictures.truth.shape[0] - 0.5, -0.5))


def _shrink(pictures: Pictures) -> Pictures:
    """Return the pictures at no more pixels than the figure prints."""
    from PIL import Image

    h, w = pictures.truth.shape
    scale = _SIDE_PX / max(h, w)
    if scale >= 1:
        return pictures
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    image = np.asarray(Image.fromarray(pictures.image).resize(size, Image.Resampling.BOX))

    def small(mask: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) > 127

    return Pictures(image, small(pictures.truth), small(pictures.prediction))


def _wrap(label: str) -> str:
    """Return a long label on two lines, broken at the underscore, slash or hyphen nearest to its middle."""
    breaks = [i + 1 for i, c in enumerate(label[:-1]) if c in "_/-"]
    if len(label) <= 14 or not breaks:
        return label
    at = min(breaks, key=lambda i: abs(i - len(label) / 2))
    return label[:at] + "\n" + label[at:]
