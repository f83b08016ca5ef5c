"""`python -m analysis erf FILE...`: effective receptive fields that `python -m launch erf` measured, drawn.

As in table 1 of Taha et al. (MICCAI 2022): the field, its square root, and its sums over columns and over rows.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from analysis.output.figure_style import COLUMN_IN, PAGE_IN, Drawing, look, new_figure, style
from analysis.runs.records import RunsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_FIELDS = 5
_SIDE_PX = 300  # longest side of a map in the figure
_POINTS = 100  # of a profile, each the mean of neighbours: single rows of a random network are noisy


@dataclass(frozen=True)
class MeasuredField:
    """A measured field."""

    label: str  # Its experiment
    map: NDArray[np.float64]  # (H, W) float64
    about: dict[str, Any]  # What was measured, as the file says

    @property
    def pixel_px(self) -> int:
        """Pixels of the picture along a side of one of the map's."""
        return int(self.about.get("pixel_px", 1))

    @property
    def picture_px(self) -> str:
        """Height x width of the picture."""
        return " x ".join(str(side * self.pixel_px) for side in self.map.shape)


def read_field(path: Path) -> MeasuredField:
    """Read one file.

    Raises:
        RunsError: It cannot be read, or is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            values, about = np.asarray(file["map"], np.float64), json.loads(str(file["about"]))
    except KeyError as error:
        raise RunsError(f"{path}: has no {error.args[0]}; not written by `python -m launch erf`", 1) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "not an npz file that `python -m launch erf` wrote"
        raise RunsError(f"{path}: {reason}", 1) from None
    if values.ndim != 2 or not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise RunsError(f"{path}: map must be two-dimensional, not negative and not all zero", 1)
    return MeasuredField(str(about.get("experiment", path.stem)), values, about)


def read_fields(paths: Sequence[Path]) -> list[MeasuredField]:
    """Read as many files as one figure can show.

    Raises:
        RunsError: A file cannot be used.
        ValueError: Too many files.
    """
    if len(paths) > MOST_FIELDS:
        raise ValueError(f"at most {MOST_FIELDS} files can be told apart in one figure, got {len(paths)}")
    return [read_field(path) for path in paths]


def shrunk(values: NDArray[np.float64], side_px: int = _SIDE_PX) -> NDArray[np.float64]:
    """Box means of squares, so that the longest side has at most `side_px`; a cut-off rest at the ends is left out."""
    step = -(-max(values.shape) // side_px)
    rows, cols = (side // step for side in values.shape)
    if not rows or not cols:
        return values
    means: NDArray[np.float64] = values[: rows * step, : cols * step].reshape(rows, step, cols, step).mean((1, 3))
    return means


def draw(fields: Sequence[MeasuredField]) -> Drawing:
    """Maps, square roots and profiles of up to `MOST_FIELDS` fields.

    Profiles are shares of a field's sum per pixel (means of neighbours), over the distance from the picture's centre.
    """
    fields = fields[:MOST_FIELDS]
    columns = max(2, len(fields))
    tallest = max(field.map.shape[0] / field.map.shape[1] for field in fields)
    with style():
        width = max(COLUMN_IN, min(PAGE_IN, 1.75 * columns))
        tall = min(3.0, 0.9 * tallest * width / columns)  # of a row of maps
        figure = new_figure(width, 2 * tall + 2.2)
        grid = figure.add_gridspec(3, 2 * columns, height_ratios=(tall, tall, 1.5))
        for i, field in enumerate(fields):
            small = shrunk(field.map)
            for row, values in enumerate((small, np.sqrt(small))):
                axis = figure.add_subplot(grid[row, 2 * i : 2 * i + 2])
                axis.imshow(values, cmap="magma", vmin=0, vmax=values.max(), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                if i == 0:
                    axis.set_ylabel(("field", "square root")[row])
                if row == 0:
                    axis.set_title(f"{field.label}\n{field.picture_px} px")
        over_rows = figure.add_subplot(grid[2, :columns])
        over_cols = figure.add_subplot(grid[2, columns:])
        _profiles(over_rows, fields, 1, "row")
        _profiles(over_cols, fields, 0, "column")
        over_rows.set_ylabel("share per pixel (%)")
        if len(fields) > 1:
            figure.legend(*over_cols.get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(fields)))
    return Drawing("erf", "Effective receptive fields", _caption(fields), _words(fields), figure)


def _profiles(axis: "Axes", fields: Sequence[MeasuredField], over: int, name: str) -> None:
    for i, field in enumerate(fields):
        profile = 100 * field.map.sum(over) / field.map.sum() / field.pixel_px
        step = -(-len(profile) // _POINTS)
        means = profile[: len(profile) // step * step].reshape(-1, step).mean(1)
        place = ((np.arange(len(means)) + 0.5) * step - 0.5 - len(profile) // 2) * field.pixel_px
        own = look(i)
        axis.plot(place, means, color=own.colour, ls=own.dash, lw=0.9, label=field.label)
    axis.set_xlabel(f"{name}, px from the centre")
    axis.set_ylim(bottom=0)


def _caption(fields: Sequence[MeasuredField]) -> str:
    what = "; ".join(
        f"{f.label}: {f.about.get('images', '?')} pictures ({f.about.get('pictures', '?')}), "
        + (f"weights {f.about['weights']}" if f.about.get("weights") else "weights as initialised")
        for f in fields
    )
    return (
        "Mean absolute gradient of the output map's centre by the input's pixels, each field scaled to its largest "
        f"value; sums over columns (left) and rows (right). {what}."
    )


def _words(fields: Sequence[MeasuredField]) -> str:
    said = []
    for field in fields:
        reach = " x ".join(str((np.ptp(np.flatnonzero(field.map.any(axis))) + 1) * field.pixel_px) for axis in (1, 0))
        said.append(f"{field.label} reaches {reach} px of {field.picture_px}")
    return "Maps and profiles of effective receptive fields: " + "; ".join(said) + "."
