"""The papers' tables for people: published, measured and modelled rows, each row saying which it is.

A table is made of cells: read from reference/*.csv, made from records (`measured_cells`), or by a model. Every row has
a source column, a lost cell says so, and a derived cell is marked: the kinds look different without colour.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from analysis.output.formats import Column, Table, csv_text, significant, whole
from analysis.papers.entries import CONTRADICTIONS, HEADS, REFERENCE, TEXT, Cell, read_all
from analysis.papers.reference import finest_time_ratios, table2_geomean, table3_gains

SUITE = "this suite"  # the "paper" of cells that are not published
MEASURED, MODELLED, MISSING = "measured", "modelled", "missing"  # their statuses
_RANK = {"published": 0, MEASURED: 1, MODELLED: 2}
_SIZES = {1024: "1K", 4096: "4K", 8192: "8K", 16384: "16K", 32768: "32K", 65536: "64K"}
_WHOLE = {"tokens", "tokens_min", "tokens_max", "gpus", "depth", "images", "positive_images", "negative_images"}


@dataclass(frozen=True)
class PaperTable:
    """What one table shows, as reference/tables.yaml says: the cells of a reference file, and a column per quantity."""

    title: str
    file: str
    columns: dict[str, str]  # head by quantity
    by_resolution: bool = False


_MIXED = {"s/image/GPU": "s/image", "stated gain (%)": "gain (%)"}  # heads where not all rows are published
with (REFERENCE / "tables.yaml").open(encoding="utf-8") as _file:
    TABLES = {name: PaperTable(**spec) for name, spec in yaml.safe_load(_file).items()}


def table_cells(name: str) -> list[Cell]:
    """Return the published cells of a table.

    Raises:
        KeyError: no such table.
        ValueError: a reference file does not follow its schema.
    """
    return read_all()[TABLES[name].file]


def paper_table(name: str, cells: Sequence[Cell], remarks: Sequence[str] = ()) -> Table:
    """Return a table of published, measured and modelled cells; rows appear in an order fixed by the cells alone.

    Args:
        name: A key of TABLES.
        cells: Published cells in the paper's order, other cells in the order their rows shall have.
        remarks: Notes on the measured or modelled rows.
    """
    spec = TABLES[name]
    rows: dict[tuple[str, ...], dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault((source(cell), cell.paper, cell.table, cell.row), {})[cell.quantity] = cell
    ordered = list(rows.items())
    if spec.by_resolution:
        ordered.sort(key=lambda item: (_resolution(item[1]), _RANK[item[0][0]]))
    else:
        ordered.sort(key=lambda item: _RANK[item[0][0]])
    several = len({table for kind, _, table, _ in rows if kind == "published"}) > 1
    lines, kinds, previous = [], [], None
    for (kind, _, table, row), mine in ordered:
        sizes = list(dict.fromkeys(_size(c.size) for c in mine.values() if c.size))
        size = ", ".join(sizes)
        label = row.split(" ", 1)[1] if spec.by_resolution and kind != MEASURED else row
        if kind == "published" and (several or table.startswith(("text", "abstract", "Figure"))):
            label += f" (Table {table})" if table.isdigit() else f" ({table})"
        lines.append([size, label, kind, *(shown(q, mine) for q in spec.columns)])
        group = (kind, size) if spec.by_resolution else kind
        kinds.append(kind if group == previous else f"{kind} first")
        previous = group
    words = {c.quantity for c in cells if c.unit == TEXT}
    columns = [Column("resolution"), Column("row"), Column("source")]
    only = all(source(c) == "published" for c in cells)
    columns += [Column(head if only else _MIXED.get(head, head), q not in words) for q, head in spec.columns.items()]
    kept = [i for i in range(len(columns)) if i < 3 or any(line[i] != "" for line in lines) or not lines]
    kinds_here = sorted({k[0] for k, _ in ordered}, key=lambda kind: _RANK[kind])
    state = "as published" if kinds_here == ["published"] else f"({', '.join(kinds_here) or 'no row'})"
    return Table(
        f"{spec.title} {state}",
        [columns[i] for i in kept],
        [[line[i] for i in kept] for line in lines],
        kinds,
        (*_notes(name, cells), *remarks),
        f"{name}-table",
    )


def source(cell: Cell) -> str:
    """Return published, measured or modelled; derived and lost cells belong to a published row."""
    if cell.paper != SUITE:
        return "published"
    return MODELLED if cell.status == MODELLED else MEASURED


def _resolution(row: dict[str, Cell]) -> int:
    return max((c.resolution or 0 for c in row.values()), default=0)


def _size(size: str) -> str:
    return _SIZES.get(int(size), size) if size.isdigit() else size


def shown(quantity: str, row: dict[str, Cell]) -> str | None:
    """Return a cell for people: as printed, "lost", marked "(derived)", None where missing, "" where there is none."""
    cell = row.get(quantity)
    if cell is None:
        return ""
    if cell.status == "lost":
        return "lost"
    if cell.status == MISSING:
        return None
    text = _number(cell)
    low, high = row.get(f"{quantity}_low"), row.get(f"{quantity}_high")
    if low and high and low.text and high.text:
        text += f" [{_number(low)}, {_number(high)}]"
    return text + (" (derived)" if cell.status == "derived" else "")


def _number(cell: Cell) -> str:
    """Return the text of a cell: counts with thousands separated, printed numbers as printed, our own ones rounded."""
    if cell.unit == TEXT or cell.value is None:
        return cell.text
    if cell.quantity in _WHOLE:
        return whole(cell.value) or ""
    if cell.status not in (MEASURED, MODELLED):
        return cell.text
    return f"{cell.value:.2f}" if cell.unit in ("%", "point") else significant(cell.value, 4) or ""


# ---- notes


def _notes(name: str, cells: Sequence[Cell]) -> list[str]:
    """Return what a reader must know about the numbers of a table."""
    notes = []
    published = [c for c in cells if source(c) == "published"]
    if name == "apf2" and published:
        notes.append(f"Geometric mean of the derived speedups: {table2_geomean(published):.2f}.")
    if name == "apf3" and published:
        notes += _notes_of_table3(published)
    if published:
        notes.append(
            'published: on the papers\' hardware and data, nothing measured here. "lost": printed in the paper and '
            'not known; "(derived)": follows from printed numbers or words; empty: the row has no such number.'
        )
    if name in ("apf2", "apf3") and published:
        notes.append("APF's resolutions are derived from depth = log2(R / p).")
    if name == "apf3" and len(published) < len(cells):
        notes.append("s/image of measured rows is wall time over all GPUs; the paper heads its own Sec/Image/GPU.")
    said: dict[tuple[str, str], list[str]] = {}
    for cell in published:
        if cell.note and cell.status == "derived":
            said.setdefault((cell.quantity, cell.note), []).append(cell.row)
    heads = TABLES[name].columns
    return notes + [
        f"(derived) {heads.get(quantity, quantity)} of {', '.join(rows)}: {note}."
        for (quantity, note), rows in said.items()
    ]


def _notes_of_table3(cells: Sequence[Cell]) -> list[str]:
    gains = table3_gains(cells)
    good = [g for g in gains if g.recomputed is not None]
    bad = [g for g in gains if g.recomputed is None]
    mean = sum(g.recomputed or 0 for g in good) / len(good)
    times = ", ".join(f"{_size(str(r))}: {v:.2f}" for r, v in finest_time_ratios(cells).items())
    shown_gains = ", ".join(
        f"{_size(str(g.resolution))}: {g.stated:.2f} % over {(g.base or '').split(' ', 1)[1]}" for g in good
    )
    return [
        f"{len(good)} of {len(gains)} stated gains follow from the printed Dice ({shown_gains}); their mean is "
        f"{mean:.2f} %. Not reproduced: "
        + ", ".join(f"{_size(str(g.resolution))} ({g.stated:.2f} %)" for g in bad)
        + ".",
        f"Time of the finest UNETR over time of the finest APF: {times}.",
    ]


def contradictions_table() -> Table:
    """Return where the papers' numbers contradict each other, as a table."""
    with CONTRADICTIONS.open(newline="", encoding="utf-8") as file:
        heads, *found = csv.reader(file)
    return Table(
        f"Contradictions among the published numbers ({len(found)})",
        [Column(head) for head in heads],
        found,
        ["published"] * len(found),
        ("Found by arithmetic on the cells of the reference files; nothing here was measured by this suite.",),
        "contradictions-table",
    )


# ---- for programs

CSV_HEADS = ("source", *HEADS)


def cells_csv(cells: Sequence[Cell]) -> str:
    """Return cells one per line: the columns of the reference files behind the source, numbers with all digits."""
    rows = [
        [source(c), c.paper, c.table, c.row, c.size, c.model, c.patch_px, c.quantity, c.text, c.unit, c.status, c.note]
        for c in cells
    ]
    return csv_text(CSV_HEADS, rows)
