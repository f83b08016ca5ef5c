"""The numbers that the papers print, from reference/*.csv, and the arithmetic on them (standard library only).

Each line of a CSV is one cell: paper, table, row, what it measures, value, unit and status. `published` is printed in
the paper, `derived` follows from printed numbers, `lost` was printed and is not known: its value is empty. The
resolution of every row is derived: the frame side that depth = log2(R / p) gives.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.formats import Column, Table
from analysis.stats import geomean

REFERENCE = Path(__file__).resolve().parent / "reference"
STATUSES = ("published", "derived", "lost")


@dataclass(frozen=True)
class Cell:
    """One cell of a published table; `value` is None where it is lost, `text` is the number as printed."""

    paper: str
    table: str
    row: str
    resolution: int
    model: str
    patch_px: int | None
    quantity: str
    text: str
    unit: str
    status: str
    note: str

    @property
    def value(self) -> float | None:
        """The number, in `unit`."""
        return float(self.text) if self.text else None


def read_cells(path: Path) -> list[Cell]:
    """Return the cells of one reference file, in its order.

    Raises:
        ValueError: an unknown status, a lost cell with a value, another cell without one, or a cell that comes twice;
            the message names file and line.
    """
    cells: list[Cell] = []
    seen = set()
    with path.open(newline="", encoding="utf-8") as file:
        for line, raw in enumerate(csv.DictReader(file), start=2):
            place = f"{path.name}:{line}"
            if raw["status"] not in STATUSES:
                raise ValueError(f"{place}: status {raw['status']!r} is none of {', '.join(STATUSES)}")
            if (raw["status"] == "lost") != (raw["value"] == ""):
                raise ValueError(f"{place}: exactly the lost cells are empty")
            key = (raw["paper"], raw["table"], raw["row"], raw["quantity"])
            if key in seen:
                raise ValueError(f"{place}: {' '.join(key)} comes twice")
            seen.add(key)
            patch = int(raw["patch_px"]) if raw["patch_px"] else None
            names = ("paper", "table", "row", "model", "quantity", "unit", "status", "note")
            cells.append(
                Cell(resolution=int(raw["resolution"]), patch_px=patch, text=raw["value"], **{n: raw[n] for n in names})
            )
    return cells


def table2() -> list[Cell]:
    """Return the cells of APF's Table II: seconds per image at equal quality, adaptive against uniform."""
    return read_cells(REFERENCE / "apf_table2.csv")


def table3() -> list[Cell]:
    """Return the cells of APF's Table III: Dice and seconds per image by resolution, model, patch and GPUs."""
    return read_cells(REFERENCE / "apf_table3.csv")


def table2_speedups(cells: Sequence[Cell]) -> dict[int, float]:
    """Return, per resolution, the published seconds per image of UNETR divided by those of APF."""
    seconds = {(c.resolution, c.model): c.value for c in cells if c.quantity == "seconds_per_image" and c.value}
    return {r: seconds[r, "UNETR"] / seconds[r, "APF-UNETR"] for r in sorted({r for r, _ in seconds})}


def table2_geomean(cells: Sequence[Cell]) -> float:
    """Return the geometric mean of those speedups."""
    return geomean(table2_speedups(cells).values())


@dataclass(frozen=True)
class Gain:
    """The relative Dice gain that Table III states for a resolution, and what the printed cells give."""

    resolution: int
    stated: float
    recomputed: float | None
    base: str | None


def table3_gains(cells: Sequence[Cell]) -> list[Gain]:
    """Return each stated gain with the published UNETR row that reproduces it.

    The gain is 100 * (Dice of the finest APF / Dice of a UNETR row - 1). The paper does not say which row; the gain
    counts as reproduced when one published row gives it to the two printed decimals. `recomputed` and `base` are None
    otherwise.
    """
    gains = []
    for resolution in sorted({c.resolution for c in cells}):
        here = [c for c in cells if c.resolution == resolution]
        stated = next(c.value for c in here if c.quantity == "stated_gain")
        dice = [c for c in here if c.quantity == "dice" and c.status == "published"]
        finest = min((c for c in dice if c.model == "APF-UNETR"), key=lambda c: c.patch_px).value
        tries = [(100 * (finest / c.value - 1), c.row) for c in dice if c.model == "UNETR"]
        found = next(((g, row) for g, row in tries if abs(g - stated) < 0.0051), (None, None))
        gains.append(Gain(resolution, stated, *found))
    return gains


# ---- tables for people

_SIZES = {512: "512", 1024: "1K", 4096: "4K", 8192: "8K", 16384: "16K", 32768: "32K", 65536: "64K"}


def _pivot(cells: Sequence[Cell], quantities: Sequence[tuple[str, str]]) -> tuple[list[list[str | None]], list[str]]:
    """Return one line per row of the paper: resolution, model-patch, then a quantity per column, and the rows' kinds.

    A lost cell says "lost", a derived one says so behind its number, a quantity that the paper's row does not have is
    empty: the three look different without colour.
    """
    rows, kinds = [], []
    for name in dict.fromkeys(c.row for c in cells):
        mine = {c.quantity: c for c in cells if c.row == name}
        first = next(iter(mine.values()))
        row: list[str | None] = [_SIZES[first.resolution], name.split(" ", 1)[1]]
        for quantity, _ in quantities:
            cell = mine.get(quantity)
            row.append("" if cell is None else "lost" if cell.status == "lost" else _shown(cell))
        rows.append(row)
        kinds.append("published" if len(rows) > 1 and rows[-2][0] == row[0] else "published first")
    return rows, kinds


def _shown(cell: Cell) -> str:
    whole = cell.quantity in ("tokens", "gpus", "depth")
    return (f"{int(cell.text):,}" if whole else cell.text) + (" (derived)" if cell.status == "derived" else "")


def published_tables() -> list[Table]:
    """Return APF's Tables II and III as tables for people, with what the arithmetic on them gives as notes."""
    two, three = table2(), table3()
    quantities2 = [
        ("gpus", "GPUs"), ("seconds_per_image", "s/image"), ("tokens", "L"), ("depth", "depth"), ("dice", "Dice (%)"),
        ("speedup", "speedup"), ("speedup_to_convergence", "speedup to convergence"),
    ]  # fmt: skip
    quantities3 = [
        ("gpus", "GPUs"), ("seconds_per_image", "s/image/GPU"), ("depth", "depth"), ("tokens", "L"),
        ("dice", "Dice (%)"), ("stated_gain", "stated gain (%)"),
    ]  # fmt: skip
    gains = table3_gains(three)
    good = [g for g in gains if g.recomputed is not None]
    bad = [g for g in gains if g.recomputed is None]
    common = (
        "Published numbers on other hardware and data: nothing here was measured by this suite.",
        '"lost": printed in the paper and not known; "(derived)": computed from printed ones; empty: no such number.',
        "Resolutions are derived from depth = log2(R / p).",
    )
    notes2 = (f"Geometric mean of the derived speedups: {table2_geomean(two):.2f}.", *common)
    notes3 = (
        f"{len(good)} of {len(gains)} stated gains follow from the printed Dice ("
        + ", ".join(f"{_SIZES[g.resolution]}: {g.stated} % over {g.base.split(' ', 1)[1]}" for g in good)
        + f"); their mean is {sum(g.stated for g in good) / len(good):.2f} %. "
        + "Not reproduced: " + ", ".join(f"{_SIZES[g.resolution]} ({g.stated} %)" for g in bad) + ".",
        *common,
    )  # fmt: skip
    tables = []
    for number, cells, quantities, notes, title in (
        ("II", two, quantities2, notes2, "time per image at equal quality"),
        ("III", three, quantities3, notes3, "Dice and time by resolution and model"),
    ):
        rows, kinds = _pivot(cells, quantities)
        columns = [Column("resolution"), Column("model-patch"), *(Column(head, True) for _, head in quantities)]
        caption = f"APF (SC24), Table {number} as published: {title}"
        tables.append(Table(caption, columns, rows, kinds, notes, f"apf-table-{number.lower()}"))
    return tables
