"""How every figure looks and is saved: column widths, Okabe-Ito colours, vector and PNG files."""

import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.output.formats import write_files

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLUMN_IN = 3.45  # one column of a two-column paper
PAGE_IN = 7.1
# Okabe and Ito's colours, distinguishable with the common colour-vision deficiencies; yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)), (0, (7, 2)), (0, (2, 1)), (0, (5, 1, 1, 1, 1, 1)))
GREY = "#5f5f5f"
MOST_RUNS = 14  # more lines cannot be told apart; the caption then says how many are not drawn
_STYLE = Path(__file__).with_name("house.mplstyle")


@dataclass(frozen=True)
class Drawing:
    """A finished figure with its words: file name, heading, caption, and what it shows for who cannot see it."""

    slug: str
    title: str
    caption: str
    alt: str
    figure: "Figure"
    photographic: bool = False  # a page embeds photographs as JPEG or PNG and the rest as SVG


@contextmanager
def style() -> Iterator[None]:
    """Use the house style while figures are made and saved."""
    from matplotlib import style as matplotlib_style

    with matplotlib_style.context(_STYLE):
        yield


def new_figure(width_in: float, height_in: float) -> "Figure":
    """Return an empty figure without any window system or global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


@dataclass(frozen=True)
class Style:
    """Colour, marker and dash of one run: each alone tells runs apart, for print in grey."""

    colour: str
    marker: str
    dash: object


def look(i: int) -> Style:
    """Return the look of the i-th run; after seven, colours come back with other markers and dashes."""
    n = len(COLOURS)
    return Style(COLOURS[i % n], MARKERS[(i + i // n) % n], DASHES[(i + i // n) % n])


def encode(figure: "Figure", suffix: str) -> bytes:
    """Return a figure as the bytes of a png, jpg, svg or pdf file; but for pdf the same at every call."""
    out = io.BytesIO()
    metadata = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    }
    options = {"pil_kwargs": {"quality": 90, "subsampling": 0}} if suffix == "jpg" else {"metadata": metadata[suffix]}
    with style():
        figure.savefig(out, format=suffix, bbox_inches="tight", pad_inches=0.03, **options)
    return out.getvalue()


def save(drawings: Sequence[Drawing], out: Path) -> list[Path]:
    """Write each drawing as .png, .svg and .pdf and return the paths.

    Raises:
        ValueError: the folder cannot be written.
    """
    return [
        path
        for drawing in drawings
        for suffix in ("png", "svg", "pdf")
        for path in write_files(out, {f"{drawing.slug}.{suffix}": encode(drawing.figure, suffix)})
    ]


def plain_log(side: "Axis", form: str = "{:,.10g}") -> None:
    """Label one side (axis.xaxis, axis.yaxis) of a logarithmic plot with plain numbers, enough for its range.

    Call it when the limits are final: the powers of ten alone leave a range of less than a decade without any label.
    """
    from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullFormatter

    low, high = side.get_view_interval()
    span = high / low if low > 0 else float("inf")
    steps = (1, 2, 3, 5) if span < 12 else (1, 2, 5) if span < 150 else (1,)
    locator: Locator = MaxNLocator(4) if span < 3 else LogLocator(subs=steps)
    side.set_major_locator(locator)
    side.set_major_formatter(lambda v, _: form.format(v))
    side.set_minor_formatter(NullFormatter())


def legend_below(
    figure: "Figure", handles: Sequence[Any], labels: Sequence[str], columns: int = 4, long: float = 1
) -> None:
    """Put a legend under the figure, with no more columns than its labels leave room for.

    Args:
        figure: The figure.
        handles: What matplotlib draws as the key.
        labels: One per handle.
        columns: At most.
        long: Length of a key, in letters' heights; 2.6 shows the dashes of a line.
    """
    letters_in = 0.062  # mean width of a letter of 7 pt
    room = figure.get_figwidth() / (letters_in * max(map(len, labels)) + 0.1 * long + 0.25)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=max(1, min(columns, len(labels), int(room))),
        columnspacing=1.4,
        handlelength=long,
        handletextpad=0.6,
    )


def between(counts: Sequence[int]) -> str:
    """Return "n = 3", or "n = 1 to 3" where counts differ."""
    low, high = min(counts), max(counts)
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Return positions moved apart to at least `gap`, in the same order and near to where they were."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    moved = list(positions)
    for _ in range(200):
        worst = 0.0
        for a, b in itertools.pairwise(order):
            lack = gap - (moved[b] - moved[a])
            if lack > 1e-9:
                moved[a] -= lack / 2
                moved[b] += lack / 2
                worst = max(worst, lack)
        if worst <= 1e-9:
            break
    return moved
