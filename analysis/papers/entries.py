"""The numbers that papers print, one cell per line of reference/*.csv.

Each line is one cell: paper, table, row, what it measures, value, unit and status. A `published` cell is printed in the
paper. A `derived` cell follows from printed numbers or words. A `lost` cell was printed, but its value is not known and
stays empty. Tables named "text", "abstract" or "Figure" are numbers from there. APF's resolutions are derived from
depth = log2(R / p).
"""

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
CONTRADICTIONS = REFERENCE / "contradictions.csv"  # where the cells contradict each other: no cells
STATUSES = ("published", "derived", "lost")
HEADS = ("paper", "table", "row", "resolution", "model", "patch_px", "quantity", "value", "unit", "status", "note")
TEXT = "text"  # the unit of a cell that holds words


class ReferenceFileError(ValueError):
    """A reference file that does not follow its schema; the message names file and line."""


@dataclass(frozen=True)
class Cell:
    """One cell of a published table; `value` is None where it is lost or words, `text` is the cell as printed.

    `resolution` is the longer side of the input in px, `size` both sides as written ("512", "3328x2560").
    """

    paper: str
    table: str
    row: str
    size: str
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
        return float(self.text) if self.text and self.unit != TEXT else None

    @property
    def resolution(self) -> int | None:
        """The longer side of the input in px."""
        return max(map(int, self.size.split("x"))) if self.size else None

    @property
    def place(self) -> str:
        """Where a reader finds it: paper, table, row."""
        table = self.table if re.match(r"text|abstract|Figure", self.table) else f"Table {self.table}"
        return f"{self.paper}, {table}, {self.row}"


def read_cells(path: Path) -> list[Cell]:
    """Return the cells of one reference file, in its order.

    Raises:
        ValueError: other columns, an unknown status, a lost cell with a value, another cell without one, a value or
            size that is no number, or a cell that comes twice; the message names file and line.
    """
    cells: list[Cell] = []
    seen = set()
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != HEADS:
            raise ReferenceFileError(f"{path.name}:1: the columns are not {','.join(HEADS)}")
        for line, raw in enumerate(reader, start=2):
            try:
                cell = _cell(raw)
            except ValueError as error:
                raise ReferenceFileError(f"{path.name}:{line}: {error}") from None
            key = (cell.paper, cell.table, cell.row, cell.quantity)
            if key in seen:
                raise ReferenceFileError(f"{path.name}:{line}: {' '.join(key)} comes twice")
            seen.add(key)
            cells.append(cell)
    return cells


def _cell(raw: dict[str, str | None]) -> Cell:
    if None in raw or None in raw.values():
        raise ValueError(f"not {len(HEADS)} cells in this line")
    text = {k: str(v) for k, v in raw.items()}
    if text["status"] not in STATUSES:
        raise ValueError(f"status {text['status']!r} is none of {', '.join(STATUSES)}")
    if (text["status"] == "lost") != (text["value"] == ""):
        raise ValueError("exactly the lost cells are empty")
    for name in ("paper", "table", "row", "quantity", "unit"):
        if not text[name]:
            raise ValueError(f"{name} is empty")
    if text["unit"] != TEXT and not re.fullmatch(r"(\d+(\.\d+)?)?", text["value"]):
        raise ValueError(f"value {text['value']!r} is no number")
    if not re.fullmatch(r"(\d+(x\d+)?)?", text["resolution"]):
        raise ValueError(f"resolution {text['resolution']!r} is neither a side nor width x height")
    if not re.fullmatch(r"\d*", text["patch_px"]):
        raise ValueError(f"patch_px {text['patch_px']!r} is no number")
    names = ("paper", "table", "row", "model", "quantity", "unit", "status", "note")
    patch = int(text["patch_px"]) if text["patch_px"] else None
    return Cell(size=text["resolution"], patch_px=patch, text=text["value"], **{n: text[n] for n in names})


def read_all(folder: Path = REFERENCE) -> dict[str, list[Cell]]:
    """Return the cells of every reference file by its stem, files in the order of their names.

    Raises:
        ValueError: as `read_cells`.
    """
    return {path.stem: read_cells(path) for path in sorted(folder.glob("*.csv")) if path != CONTRADICTIONS}


def wide(cells: Iterable[Cell]) -> pd.DataFrame:
    """Return the numbers of cells with a row for each of theirs, in their order, and a column for each quantity.

    The row's name, resolution, model and patch_px stand before the quantities; NaN is a number that is lost, or none.
    """
    rows: dict[str, dict[str, Any]] = {}
    for cell in cells:
        about = {"row": cell.row, "resolution": cell.resolution, "model": cell.model, "patch_px": cell.patch_px}
        row = rows.setdefault(cell.row, about)
        if cell.value is not None:
            row[cell.quantity] = cell.value
    return pd.DataFrame(list(rows.values()))


def table2() -> list[Cell]:
    """Return the cells of APF's Table II: seconds per image at equal quality, adaptive against uniform."""
    return read_cells(REFERENCE / "apf_table2.csv")


def table3() -> list[Cell]:
    """Return the cells of APF's Table III: Dice and seconds per image by resolution, model, patch and GPUs."""
    return read_cells(REFERENCE / "apf_table3.csv")
