import csv
import re
from pathlib import Path

import pytest

from analysis.output.formats import latex, markdown
from analysis.papers.entries import HEADS, REFERENCE, read_all, read_cells, table2, table3
from analysis.papers.reference import finest_time_ratios, table2_geomean, table2_speedups, table3_gains
from analysis.papers.tables import TABLES, contradictions_table, paper_table, table_cells
from analysis.runs.stats import geomean


def test_table2_speedups_and_their_geomean():
    speedups = table2_speedups(table2())
    assert {r: round(s, 2) for r, s in speedups.items()} == {
        512: 7.49,
        1024: 7.61,
        4096: 5.77,
        8192: 2.29,
        16384: 2.91,
        32768: 3.80,
        65536: 2.31,
    }
    assert round(table2_geomean(table2()), 2) == 4.09


def test_derived_speedups_of_the_file_follow_from_its_seconds():
    speedups = table2_speedups(table2())
    derived = {c.resolution: c.value for c in table2() if c.quantity == "speedup"}
    assert derived == {r: pytest.approx(s, abs=0.005) for r, s in speedups.items()}


def test_six_of_seven_gains_reproduce_with_mean_5_46():
    gains = table3_gains(table3())
    good = {g.resolution: g for g in gains if g.recomputed is not None}
    assert len(gains) == 7
    assert sorted(good) == [1024, 4096, 8192, 16384, 32768, 65536]
    assert good[1024].base == "1K UNETR-32"
    assert round(sum(g.stated for g in good.values()) / 6, 2) == 5.46
    assert round(sum(g.recomputed for g in good.values()) / 6, 2) == 5.46


def test_depth_agrees_with_resolution_and_patch():
    for cell in [*table2(), *table3()]:
        if cell.quantity == "depth":
            assert 2**cell.value * cell.patch_px == cell.resolution, cell.row


# What a quantity may be measured in; a quantity that is not here is a misspelling.
UNITS = {
    "accuracy": "%",
    "accuracy_256": "%",
    "accuracy_320": "%",
    "accuracy_gain": "point",
    "ap_gain": "point",
    "auc_asymmetry": "%",
    "auc_calcifications": "%",
    "auc_distortion": "%",
    "auc_gain": "point",
    "auc_image": "%",
    "auc_mass": "%",
    "auc_patch": "%",
    "complexity": "text",
    "depth": "level",
    "dice": "%",
    "gflops": "GFLOP",
    "gpus": "gpu",
    "growth": "text",
    "images": "image",
    "images_per_s": "image/s",
    "implementation": "text",
    "inference_ms": "ms",
    "linear_approximation": "text",
    "mean_gain": "%",
    "mean_patch": "px",
    "memory_saved": "%",
    "merits_demerits": "text",
    "method": "text",
    "miou_gain": "point",
    "model": "text",
    "negative_images": "image",
    "optimiser": "text",
    "parameters": "M",
    "patch_sides": "text",
    "positive_images": "image",
    "preprocessing_seconds": "s",
    "scales": "text",
    "seconds": "s",
    "seconds_per_epoch": "s",
    "seconds_per_image": "s",
    "speedup": "ratio",
    "speedup_geomean": "ratio",
    "speedup_to_convergence": "ratio",
    "split_value": "edge px",
    "stated_gain": "%",
    "time_saved": "%",
    "tokens": "token",
    "tokens_max": "token",
    "tokens_min": "token",
    "top1": "%",
    "top1_gain": "point",
    "top5": "%",
}


@pytest.mark.parametrize("stem", sorted(read_all()))
def test_every_reference_file_keeps_the_schema(stem):
    path = REFERENCE / f"{stem}.csv"
    assert path.read_bytes().isascii()
    assert b"\r" not in path.read_bytes()
    cells = read_all()[stem]
    assert cells
    assert len({c.paper for c in cells}) == 1
    for cell in cells:
        assert (cell.text == "") == (cell.status == "lost"), cell.place
        quantity = cell.quantity.removesuffix("_low").removesuffix("_high")
        unit = "leaf" if quantity.startswith("leaves_") else UNITS[quantity]
        assert cell.unit == unit or (stem, quantity, cell.unit) == ("shf", "stated_gain", "point"), cell.place
        assert cell.status != "derived" or cell.note, f"{cell.place}: derived from what?"
        assert cell.unit != "%" or cell.value is None or 0 <= cell.value <= 100, cell.place
    for cell in cells:
        if cell.quantity.endswith("_low"):
            low, mid, high = (
                next(c.value for c in cells if (c.row, c.quantity) == (cell.row, cell.quantity[:-4] + end))
                for end in ("_low", "", "_high")
            )
            assert low < mid < high, cell.place


def test_every_cell_is_in_a_table():
    shown = {(stem, c.quantity) for t in TABLES.values() for stem in [t.stem] for c in read_all()[stem]}
    columns = {(stem, q) for t in TABLES.values() for stem in [t.stem] for q in t.columns}
    intervals = {(stem, q) for stem, q in shown if q.endswith(("_low", "_high"))}
    assert {stem for stem, _ in shown} == set(read_all())
    left_out = {(stem, "linear_approximation") for stem in ("hct_table3", "hct_tableA1")}
    assert shown - intervals - columns == left_out, "only what the row's name says already is left out"


def test_what_the_papers_add_up_to():
    cells = read_all()
    assert sum(c.status == "lost" for c in cells["apf_table4"]) == 3
    for part in ("train", "val", "test"):
        row = {c.quantity: c.value for c in cells["hct_text"] if c.row == part}
        assert row["positive_images"] + row["negative_images"] == row["images"]
    shf = [c.value for c in cells["shf"] if c.table == "PAIP" and c.quantity == "speedup"]
    assert round(geomean(shf), 1) == 12.2
    # A mean of n leaves over 208 slides: the histogram's leaves divided by 208 are the mean length (Figure 3).
    for v, length in ((100, 126.99), (50, 270.48), (20, 691.82)):
        leaves = {c.quantity: c.value for c in cells["apf_figure3"] if c.row == f"512 split {v}"}
        counts = {int(q[7:-2]): n for q, n in leaves.items() if q.startswith("leaves_")}
        assert sum(counts.values()) / 208 == pytest.approx(length, abs=0.005)
        assert sum(side**2 * n for side, n in counts.items()) / 208 == 512**2


def test_the_finest_rows_are_hardly_faster_from_8k_up():
    ratios = finest_time_ratios(table3())
    assert [round(v, 2) for v in ratios.values()] == [7.96, 4.69, 2.68, 1.14, 1.05, 1.04, 1.04]


def test_the_contradictions_are_found():
    found = contradictions_table().rows
    text = [f"{where}: {says} | {but}" for _, where, says, but, _ in found]
    assert len(found) == 22
    for words in (
        ("1K APF-8", "L = 1,024", "L = 784"),
        ("4K APF-16", "L = 2,116", "L = 1,024"),
        ("1K UNETR-8", "on 8 GPUs", "on 32 GPUs"),
        ("4K APF-16", "on 128 GPUs", "on 32 GPUs"),
        ("8K APF-16", "on 256 GPUs", "on 64 GPUs"),
        ("32K APF-32", "on 1,024 GPUs", "on 256 GPUs"),
        ("64K APF-32", "on 2,048 GPUs", "on 512 GPUs"),
        ("8192", "78.31, 77.61, 76.13", "32768"),
        ("512 px", "4.11 %", "1.31 % over 512 UNETR-4"),
        ("1024 px", "7.10 %", "3.57 % over 1K UNETR-8"),
        ("64K", "4x", "2.31x"),
        ("abstract", "6.9x", "4.09x"),
        ("5.5 %", "5.27 %", "5.46 %"),
        ("distortion", "+5.0", "4.5"),
        ("asymmetry", "+4.5", "5.0"),
        ("sinusoidal conv", "77.93", "78.01"),
        ("3090", "64.3", "58.9"),
        ("64K", "7.03", "7.65"),
        ("64K", "patch 512", "patch 1024"),
    ):
        assert sum(all(w in t for w in words) for t in text) == 1, words


def test_the_contradicting_numbers_are_those_of_the_cells():
    """Every number that a statement quotes from a table is in a cell of that paper's reference files."""
    printed: dict[str, set[str]] = {}
    for cells in read_all().values():
        for cell in cells:
            printed.setdefault(cell.paper, set()).add(cell.text)
            if cell.value is not None:
                printed[cell.paper].add(f"{cell.value:,.0f}")
    for paper, where, says, but, _ in contradictions_table().rows:
        known = set().union(*(texts for name, texts in printed.items() if name in paper))
        quoted = re.findall(r"\d[\d,]*\.\d+|(?<=on )[\d,]+(?= GPUs)|(?<=L = )[\d,]+", says)
        assert all(number.rstrip("0") in {t.rstrip("0") for t in known} for number in quoted), (where, says, but)


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_published_table_says_published_and_shows_every_row(name):
    cells = table_cells(name)
    table = paper_table(name, cells)
    assert len(table.rows) == len({(c.table, c.row) for c in cells})
    assert [c.head for c in table.columns][:3] == ["resolution", "row", "source"]
    assert {row[2] for row in table.rows} == {"published"}
    lost = sum((cell or "").startswith("lost") for row in table.rows for cell in row)
    assert lost == sum(c.status == "lost" for c in cells)
    assert "published" in markdown(table)
    assert latex(table).count("toprule") == 1


def test_hct_shows_its_intervals_and_both_sizes():
    rows = {row[1]: row for row in paper_table("hct", table_cells("hct")).rows}
    row = rows["HCT Performer-ReLU Adam + ASAM"]
    assert row[0] == "512, 3328x2560"
    assert row[-2:] == ["96.73 [96.09, 97.32]", "88.00 [86.80, 89.18]"]


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("status", "guessed", "guessed"),
        ("value", "", "empty"),
        ("status", "lost", "empty"),
        ("value", "1,024", "no number"),
        ("resolution", "1K", "resolution"),
        ("patch_px", "four", "patch_px"),
        ("row", "", "row is empty"),
    ],
)
def test_a_wrong_reference_file_is_refused_with_its_line(tmp_path: Path, column, value, says):
    with (REFERENCE / "apf_table2.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[1][column] = value
    path = tmp_path / "bad.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADS)
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ValueError, match=rf"bad\.csv:3.*{says}"):
        read_cells(path)


def test_a_cell_that_comes_twice_is_refused(tmp_path: Path):
    lines = (REFERENCE / "apf_table2.csv").read_text().splitlines()
    path = tmp_path / "twice.csv"
    path.write_text("\n".join([*lines, lines[1]]))
    with pytest.raises(ValueError, match="comes twice"):
        read_cells(path)


def test_other_columns_and_short_lines_are_refused(tmp_path: Path):
    path = tmp_path / "bad.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"bad\.csv:1: the columns"):
        read_cells(path)
    path.write_text(",".join(HEADS) + "\nx,y\n")
    with pytest.raises(ValueError, match=r"bad\.csv:2: not 11 cells"):
        read_cells(path)


def test_tables_for_people_say_published_and_lost():
    two, three = (paper_table(name, table_cells(name)) for name in ("apf2", "apf3"))
    assert two.caption.endswith("as published")
    assert len(two.rows) == 14
    assert len(three.rows) == 52
    assert all(k.startswith("published") for k in (*two.kinds, *three.kinds))
    assert two.rows[0][-1] == "lost"
    derived = [c for row in three.rows for c in row if c and "derived" in c]
    assert derived == ["75.23 (derived)"]
    assert "4.09" in two.notes[0]
    assert "5.46" in three.notes[0]


def test_a_resolution_is_set_apart_and_its_rows_stay_together():
    two = paper_table("apf2", table_cells("apf2"))
    assert two.kinds == ["published first", "published"] * 7
    body = [line.strip() for line in latex(two).splitlines()]
    assert body.count("\\midrule") == 7, "below the heads, and before each resolution but the first"
