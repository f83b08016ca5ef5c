"""The papers' tables for people: published, measured and modelled rows, each row saying which it is (no torch).

A table is made of cells: those of reference/*.csv, and cells of the same type made from records (`measured_cells`) or
by a model. Every row has a source column, a lost cell says so, and a derived one is marked, so that the kinds look
different without colour.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.output.formats import Column, Table, csv_text, significant, whole
from analysis.papers.entries import CONTRADICTIONS, TEXT, Cell, read_all
from analysis.papers.reference import finest_time_ratios, table2_geomean, table3_gains

SUITE = "this suite"  # the "paper" of cells that are not published
MEASURED, MODELLED, MISSING = "measured", "modelled", "missing"  # their statuses
_RANK = {"published": 0, MEASURED: 1, MODELLED: 2}
_SIZES = {1024: "1K", 4096: "4K", 8192: "8K", 16384: "16K", 32768: "32K", 65536: "64K"}
_WHOLE = {"tokens", "tokens_min", "tokens_max", "gpus", "depth", "images", "positive_images", "negative_images"}


@dataclass(frozen=True)
class PaperTable:
    """What one table shows: the cells of some reference files, and a column per quantity.

    Attributes:
        name: What `--which` calls it.
        title: Caption without the source.
        files: Stems of the reference files.
        columns: (quantity, head). A quantity with cells `<quantity>_low` and `_high` shows them as an interval.
        by_resolution: Rows of one resolution stand together, published first; else all published rows come first.
        tables: The paper's tables to keep of those files; empty keeps all.
    """

    name: str
    title: str
    files: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    by_resolution: bool = False
    tables: tuple[str, ...] = ()


_MIXED = {"s/image/GPU": "s/image", "stated gain (%)": "gain (%)"}  # heads where not all rows are published
_COST = (("gpus", "GPUs"), ("seconds_per_image", "s/image"))
TABLES = {
    t.name: t
    for t in (
        PaperTable(
            "apf1",
            "APF (SC24), Table I: approaches to long sequences",
            ("apf_table1",),
            (
                ("method", "method"),
                ("merits_demerits", "merits, demerits"),
                ("complexity", "complexity"),
                ("model", "model"),
                ("implementation", "implementation"),
            ),
        ),
        PaperTable(
            "apf2",
            "APF (SC24), Table II: time per image at equal quality",
            ("apf_table2",),
            (
                *_COST,
                ("tokens", "L"),
                ("depth", "depth"),
                ("dice", "Dice (%)"),
                ("speedup", "speedup"),
                ("speedup_to_convergence", "speedup to convergence"),
            ),
            True,
        ),
        PaperTable(
            "apf3",
            "APF (SC24), Table III: Dice and time by resolution and model",
            ("apf_table3",),
            (
                ("gpus", "GPUs"),
                ("seconds_per_image", "s/image/GPU"),
                ("depth", "depth"),
                ("tokens", "L"),
                ("dice", "Dice (%)"),
                ("stated_gain", "stated gain (%)"),
            ),
            True,
        ),
        PaperTable(
            "apf4",
            "APF (SC24), Table IV: BTCV, 13 organs, slices of 512 px",
            ("apf_table4",),
            (("dice", "Dice (%)"), ("speedup", "speedup"), ("train_seconds", "training (s)")),
        ),
        PaperTable(
            "apf5",
            "APF (SC24), Table V: classification of PAIP",
            ("apf_table5",),
            (
                ("gpus", "GPUs"),
                ("patch_sides", "patch sides (px)"),
                ("scales", "scales (px)"),
                ("accuracy", "accuracy (%)"),
            ),
        ),
        PaperTable(
            "apffig3",
            "APF (SC24), Figure 3: sequence length against split value",
            ("apf_figure3",),
            (
                ("split_value", "split value"),
                ("tokens", "mean L"),
                ("tokens_min", "least L"),
                ("tokens_max", "greatest L"),
                *((f"leaves_{2**k}px", f"leaves {2**k} px") for k in range(2, 9)),
            ),
        ),
        PaperTable(
            "apftext",
            "APF (SC24): numbers in the text",
            ("apf_text",),
            (
                ("speedup_geomean", "geomean speedup"),
                ("speedup", "speedup"),
                ("mean_gain", "mean Dice gain (%)"),
                ("accuracy_gain", "accuracy gain (points)"),
                ("depth", "depth"),
                ("preprocessing_seconds", "quadtree (s)"),
                ("growth", "growth of L"),
            ),
        ),
        PaperTable(
            "hct",
            "HCT (MICCAI 2022), Table 3: AUC on OPTIMAM with 95 % intervals",
            ("hct_table3",),
            (
                ("parameters", "parameters (M)"),
                ("optimiser", "optimiser"),
                ("auc_patch", "patch AUC (%)"),
                ("auc_image", "image AUC (%)"),
            ),
        ),
        PaperTable(
            "hcta1",
            "HCT (MICCAI 2022), Table A1: image AUC by finding",
            ("hct_tableA1",),
            (
                ("auc_mass", "mass (%)"),
                ("auc_calcifications", "calcifications (%)"),
                ("auc_distortion", "arch. distortion (%)"),
                ("auc_asymmetry", "focal asymmetry (%)"),
            ),
        ),
        PaperTable(
            "hcttext",
            "HCT (MICCAI 2022): data (Table 2) and numbers in text and figures",
            ("hct_text",),
            (
                ("positive_images", "malignant"),
                ("negative_images", "non-malignant"),
                ("images", "images"),
                ("auc_gain", "AUC gain (points)"),
                ("auc_image", "image AUC (%)"),
            ),
        ),
        PaperTable(
            "hiri",
            "HIRI-ViT (TPAMI 2024), Table VII: the ablation ladder on ImageNet-1K",
            ("hiri_table7",),
            (
                ("top1", "top-1 (%)"),
                ("top5", "top-5 (%)"),
                ("gflops", "cost (GMAC)"),
                ("parameters", "parameters (M)"),
                ("images_per_s", "image/s"),
            ),
        ),
        PaperTable(
            "hiritext",
            "HIRI-ViT (TPAMI 2024): numbers in abstract, text and figures",
            ("hiri_text",),
            (
                ("top1", "top-1 (%)"),
                ("gflops", "cost (GMAC)"),
                ("parameters", "parameters (M)"),
                ("inference_ms", "inference (ms)"),
                ("images_per_s", "image/s"),
                ("ap_gain", "AP gain (points)"),
                ("miou_gain", "mIoU gain (points)"),
                ("top1_gain", "top-1 gain (points)"),
            ),
        ),
        PaperTable(
            "rivit",
            "Resolution-invariant ViT (2024): Imagenette",
            ("rivit",),
            (
                ("accuracy", "accuracy (%)"),
                ("accuracy_256", "at 256 px (%)"),
                ("accuracy_320", "at 320 px (%)"),
                ("seconds_per_epoch", "s/epoch"),
                ("time_saved", "time saved (%)"),
                ("memory_saved", "memory saved (%)"),
                ("tokens", "L"),
            ),
        ),
        PaperTable(
            "shf",
            "SHF (NeurIPS 2025), the successor of APF",
            ("shf",),
            (
                ("gpus", "GPUs"),
                ("dice", "Dice (%)"),
                ("speedup", "speedup"),
                ("speedup_geomean", "geomean speedup"),
                ("stated_gain", "stated gain (points)"),
                ("seconds", "time (s)"),
                ("top1", "top-1 (%)"),
                ("accuracy", "accuracy (%)"),
                ("tokens", "L"),
                ("mean_patch", "mean patch (px)"),
            ),
        ),
    )
}


def table_cells(name: str) -> list[Cell]:
    """Return the published cells of a table.

    Raises:
        KeyError: no such table.
        ValueError: a reference file does not follow its schema.
    """
    table, files = TABLES[name], read_all()
    cells = [c for stem in table.files for c in files[stem]]
    return [c for c in cells if not table.tables or c.table in table.tables]


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
        lines.append([size, label, kind, *(shown(q, mine) for q, _ in spec.columns)])
        group = (kind, size) if spec.by_resolution else kind
        kinds.append(kind if group == previous else f"{kind} first")
        previous = group
    words = {c.quantity for c in cells if c.unit == TEXT}
    columns = [Column("resolution"), Column("row"), Column("source")]
    only = all(source(c) == "published" for c in cells)
    columns += [Column(head if only else _MIXED.get(head, head), q not in words) for q, head in spec.columns]
    kept = [i for i in range(len(columns)) if i < 3 or any(line[i] != "" for line in lines) or not lines]
    kinds_here = sorted({k[0] for k, _ in ordered}, key=lambda kind: _RANK[kind])
    state = "as published" if kinds_here == ["published"] else f"({', '.join(kinds_here) or 'no row'})"
    return Table(
        f"{spec.title} {state}",
        [columns[i] for i in kept],
        [[line[i] for i in kept] for line in lines],
        kinds,
        (*_notes(name, cells), *remarks),
        f"{spec.name}-table",
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
    heads = dict(TABLES[name].columns)
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

CSV_HEADS = (
    "source",
    "paper",
    "table",
    "row",
    "resolution",
    "model",
    "patch_px",
    "quantity",
    "value",
    "unit",
    "status",
    "note",
)


def cells_csv(cells: Sequence[Cell]) -> str:
    """Return cells one per line: the columns of the reference files behind the source, numbers with all digits."""
    rows = [
        [source(c), c.paper, c.table, c.row, c.size, c.model, c.patch_px, c.quantity, c.text, c.unit, c.status, c.note]
        for c in cells
    ]
    return csv_text(CSV_HEADS, rows)
