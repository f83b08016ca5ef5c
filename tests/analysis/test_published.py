import csv
from pathlib import Path

import pytest

from analysis.published import (
    REFERENCE,
    published_tables,
    read_cells,
    table2,
    table2_geomean,
    table2_speedups,
    table3,
    table3_gains,
)


def test_table2_speedups_and_their_geomean():
    speedups = table2_speedups(table2())
    assert {r: round(s, 2) for r, s in speedups.items()} == {
        512: 7.49, 1024: 7.61, 4096: 5.77, 8192: 2.29, 16384: 2.91, 32768: 3.80, 65536: 2.31
    }  # fmt: skip
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


def test_lost_cells_are_empty_and_every_cell_names_its_place():
    cells = [*table2(), *table3()]
    assert {c.status for c in cells} == {"published", "derived", "lost"}
    assert all((c.value is None) == (c.status == "lost") for c in cells)
    assert all(c.paper and c.table and c.row for c in cells)
    assert all(c.value is None for c in table2() if c.quantity in ("dice", "speedup_to_convergence"))


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [("status", "guessed", "guessed"), ("value", "", "empty"), ("status", "lost", "empty")],
)
def test_a_wrong_reference_file_is_refused_with_its_line(tmp_path: Path, column, value, says):
    with (REFERENCE / "apf_table2.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[1][column] = value
    path = tmp_path / "bad.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
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


def test_tables_for_people_say_published_and_lost():
    two, three = published_tables()
    assert "as published" in two.caption
    assert "as published" in three.caption
    assert len(two.rows) == 14
    assert len(three.rows) == 52
    assert all(k.startswith("published") for k in (*two.kinds, *three.kinds))
    assert two.rows[0][-1] == "lost"
    derived = [c for row in three.rows for c in row if c and "derived" in c]
    assert derived == ["75.23 (derived)"]
    assert "4.09" in two.notes[0]
    assert "5.46" in three.notes[0]
