import csv
import io
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.__main__ import main
from analysis.comparison.table import compare, comparison_table
from analysis.papers.measured_rows import BELONGS, measured_cells
from analysis.papers.tables import TABLES, paper_table, table_cells
from analysis.runs.records import load
from tests.helpers.repository import ROOT
from tests.helpers.run_folders import record, write_run

GOOD = {"floors": {"otsu": 0.1}, "steps": 100}


def comparison(root: Path, *raws: dict, metrics: bool = False):
    for i, raw in enumerate(raws):
        write_run(root, raw, metrics=metrics, folder=f"r{i}")
    return compare(load(root))


def measured(root: Path, name: str, *raws: dict) -> dict[str, dict[str, str]]:
    """Row label to head to cell of the measured rows of a table."""
    cells, notes = measured_cells(name, comparison(root, *raws))
    table = paper_table(name, cells, notes)
    heads = [c.head for c in table.columns]
    return {row[1]: dict(zip(heads, row, strict=True)) for row in table.rows}


def pair(**changes) -> tuple[dict, dict]:
    slides = {"a": 0.6, "b": 0.8}
    return (
        record("demo_apf", dice=0.77, dice_per_slide={"a": 0.67, "b": 0.87}, seconds_per_image=0.5, **GOOD, **changes),
        record("demo_uniform_patch", dice=0.7, dice_per_slide=slides, seconds_per_image=2.0, **GOOD),
    )


def test_table_3_by_hand(tmp_path: Path):
    rows = measured(tmp_path, "apf3", *pair())
    apf = rows["demo_apf"]
    assert apf["source"] == "measured"
    assert (apf["resolution"], apf["GPUs"], apf["depth"], apf["L"], apf["s/image"]) == ("1K", "2", "6", "256", "0.5000")
    assert apf["Dice (%)"] == "77.00 [67.00, 87.00]"
    assert apf["gain (%)"] == "10.00", "0.77 / 0.70 - 1"
    assert rows["demo_uniform_patch"]["gain (%)"] == ""
    assert rows["demo_uniform_patch"]["depth"] == ""


def test_a_gain_over_what_learned_nothing_is_not_stated(tmp_path: Path):
    raws = pair()
    raws[1]["floors"] = {"otsu": 0.7}
    cells, notes = measured_cells("apf3", comparison(tmp_path, *raws))
    gain = next(c for c in cells if c.quantity == "stated_gain")
    assert (gain.text, gain.status) == ("", "missing")
    assert any("is not above the best score without learning, 0.700" in note for note in notes)


def test_table_2_has_both_speedups(tmp_path: Path):
    raws = pair()
    for i, (raw, times) in enumerate(zip(raws, ((1, 10), (5, 60)), strict=True)):
        folder = write_run(tmp_path, raw, folder=f"r{i}")
        lines = [{"step": i, "train_seconds": times[i - 1], "val_dice": (i - 1) / 2} for i in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cells, notes = measured_cells("apf2", compare(load(tmp_path)))
    values = {(c.row, c.quantity): c.value for c in cells}
    assert values["demo_apf", "speedup"] == 4
    assert values["demo_apf", "speedup_to_convergence"] == pytest.approx(6)
    assert ("demo_uniform_patch", "speedup") not in values
    assert any("training time to validation Dice 0.500" in note for note in notes)


def test_table_2_is_of_pairs(tmp_path: Path):
    apf, uniform = pair()
    lone = record("demo_apf", experiment="lone", resolution=2048, run_id="x")
    rows = measured(tmp_path, "apf2", apf, uniform, lone, record("demo_tiled_unet"))
    assert set(rows) == {"demo_apf", "demo_uniform_patch"}


def test_a_refused_speedup_is_missing_and_says_why(tmp_path: Path):
    cells, notes = measured_cells("apf2", comparison(tmp_path, *pair(gpus=4)))
    assert next(c for c in cells if c.quantity == "speedup").status == "missing"
    assert any("GPUs 4 against 2" in note for note in notes)


def classifier(name: str, **changes) -> dict:
    plain = {"dice": None, "dice_pooled": None, "dice_per_slide": None, "dice_ceiling": None, "floors": None}
    return record("demo_apf", **{**plain, "task": "classification", "experiment": name, "run_id": name, **changes})


def test_every_run_is_in_the_table_of_its_paper(tmp_path: Path):
    everything = comparison(
        tmp_path,
        *pair(),
        record("demo_apf", experiment="btcv_apf", run_id="b"),
        classifier("paip_vit", accuracy=0.7),
        classifier("mammo", model="hct", auc=0.88),
        classifier("hiri_vit_row6", model="hiri_vit", accuracy=0.836),
        classifier("rivit_learned", model="rivit", accuracy=0.73),
    )
    found = {name: {c.row for c in measured_cells(name, everything)[0]} for name in BELONGS}
    assert found == {
        "apf2": {"demo_apf", "demo_uniform_patch"},
        "apf3": {"demo_apf", "demo_uniform_patch"},
        "apf4": {"btcv_apf"},
        "apf5": {"paip_vit"},
        "hct": {"mammo"},
        "hiri": {"hiri_vit_row6"},
        "rivit": {"rivit_learned"},
    }
    assert measured_cells("shf", everything) == ([], [])
    assert set(BELONGS) <= set(TABLES)


def test_auc_has_its_interval_where_the_items_are_there(tmp_path: Path):
    folder = write_run(tmp_path, classifier("mammo", model="hct", auc=0.75, parameters=1_737_010))
    cells, _ = measured_cells("hct", compare(load(tmp_path)))
    (row,) = paper_table("hct", cells).rows
    assert row[3:] == ["1.737", "AdamW", "75.00"]
    (folder / "predictions").mkdir()
    scores = folder / "predictions" / "scores.csv"
    scores.write_text("name,label,p0,p1\na,0,0.9,0.1\nb,0,0.4,0.6\nc,1,0.6,0.4\nd,1,0.1,0.9\n")
    cells, _ = measured_cells("hct", compare(load(tmp_path)))
    (row,) = paper_table("hct", cells).rows
    assert row[5].startswith("75.00 [")
    scores.write_text("name,label,p0,p1\na,0,0.9,0.1\nd,1,0.1,0.9\n")  # of another evaluation: AUC 1, not 0.75
    cells, _ = measured_cells("hct", compare(load(tmp_path)))
    assert paper_table("hct", cells).rows[0][5] == "75.00"


def test_crops_are_patches(tmp_path: Path):
    raw = classifier("m", model="gmic", auc=0.9, samples_per_image=16.0)
    cells, _ = measured_cells("hct", comparison(tmp_path, raw))
    assert {c.quantity for c in cells} == {"parameters", "optimiser", "auc_patch"}


@pytest.mark.parametrize(("side", "quantity"), [(512, "auc_patch"), (1664, "auc_image"), (3328, "auc_image")])
def test_pictures_of_512_px_are_patches_and_larger_ones_images(tmp_path: Path, side, quantity):
    raw = classifier("hct_x", model="hct", auc=0.9, samples_per_image=1.0, resolution=side)
    cells, _ = measured_cells("hct", comparison(tmp_path, raw))
    assert {c.quantity for c in cells} == {"parameters", "optimiser", quantity}


def test_measured_rows_of_hiri_vit_are_called_a_reconstruction(tmp_path: Path):
    measured_runs = comparison(tmp_path, classifier("h", model="hiri_vit", accuracy=0.8))
    _, notes = measured_cells("hiri", measured_runs)
    assert any(note.startswith("Channels, depths and expansions of h are a reconstruction") for note in notes)
    assert any("a reconstruction" in note for note in comparison_table(measured_runs).notes)


def test_sizes_that_no_training_saw_have_columns(tmp_path: Path):
    raw = classifier("r", model="rivit", accuracy=0.5, accuracy_by_size={"256": 0.25, "999": 1.0})
    cells, _ = measured_cells("rivit", comparison(tmp_path, raw))
    assert {c.quantity: c.value for c in cells if c.quantity.startswith("accuracy")} == {
        "accuracy": 50,
        "accuracy_256": 25,
    }


def test_seconds_per_epoch(tmp_path: Path):
    raw = classifier("r", model="rivit", accuracy=0.5, n_train=100, seconds_per_image=0.25)
    cells, _ = measured_cells("rivit", comparison(tmp_path, raw))
    assert next(c.value for c in cells if c.quantity == "seconds_per_epoch") == 25


def test_joined_rows_stand_with_their_resolution_and_say_their_source(tmp_path: Path):
    cells, notes = measured_cells("apf3", comparison(tmp_path, *pair()))
    table = paper_table("apf3", [*table_cells("apf3"), *cells], notes)
    sources = [(row[0], row[2]) for row in table.rows]
    assert sources == sorted(sources, key=[*dict.fromkeys(sources)].index), "no kind is scattered"
    assert sources.count(("1K", "measured")) == 2
    assert sources.index(("1K", "measured")) < sources.index(("4K", "published"))
    assert "published, measured" in table.caption
    assert any("wall time over all GPUs" in note for note in table.notes)
    assert any(note.startswith("measured: on AMD EPYC 7B13, fp32, fsdp, commit 8cfaba80") for note in table.notes)


@settings(max_examples=10)
@given(st.randoms(use_true_random=False))
def test_tables_do_not_depend_on_the_order_of_records(rng: random.Random):
    import tempfile

    raws = [*pair(), record("demo_uniform_tokens"), classifier("c", accuracy=0.5), record("demo_apf", seed=1, **GOOD)]
    texts = []
    for order in (list(range(len(raws))), rng.sample(range(len(raws)), len(raws))):
        with tempfile.TemporaryDirectory() as root:
            for place, i in enumerate(order):
                write_run(Path(root), raws[i], folder=f"{place}")
            runs = load(Path(root))
            parts = []
            for name in BELONGS:
                cells, notes = measured_cells(name, compare(runs))
                parts.append(paper_table(name, [*table_cells(name), *cells], notes))
            texts.append(parts)
    assert texts[0] == texts[1]


# ---- command line


def test_without_runs_the_published_tables(capsys):
    assert main(["tables"]) == 0
    text = capsys.readouterr().out
    for words in ("Table II:", "Table V:", "Table A1", "Imagenette", "SHF", "Contradictions", "4.09", "5.46"):
        assert words in text
    assert "| measured " not in text


def test_joined_on_the_terminal_and_as_files(tmp_path: Path, capsys):
    comparison(tmp_path / "runs", *pair())
    out = tmp_path / "out"
    which = "comparison,apf3,contradictions"
    words = ["tables", str(tmp_path / "runs"), "--which", which, "--source", "joined", "--out", str(out)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "Comparison of the measured runs" in text
    assert "| demo_apf" in text
    assert "| APF-2 " in text
    slugs = ("apf3-table", "comparison", "contradictions-table")
    names = {f"{slug}.{s}" for slug in slugs for s in ("md", "csv", "tex")}
    assert {p.name for p in out.iterdir()} == names | {"problems.csv"}
    rows = list(csv.DictReader((out / "apf3-table.csv").open()))
    assert {r["source"] for r in rows} == {"published", "measured", "modelled"}
    for kind in ("measured", "modelled"):
        assert {r["status"] for r in rows if r["source"] == kind} == {kind}
    assert all((r["value"] == "") == (r["status"] in ("lost", "missing")) for r in rows)


def test_csv_of_several_papers_is_one_list(capsys):
    assert main(["tables", "--which", "apf2,hct", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {r["paper"] for r in rows} == {"APF SC24", "HCT MICCAI22"}
    assert len(rows) == len(table_cells("apf2")) + len(table_cells("hct"))


def test_records_without_a_row_say_so(tmp_path: Path, capsys):
    comparison(tmp_path, *pair())
    assert main(["tables", str(tmp_path), "--which", "hiri", "--format", "tex"]) == 0
    assert "No measured run belongs to this table." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--which", "apf9"], "no table 'apf9'; there are: comparison, apf1"),
        (["--which", ","], "no table ','"),
        (["--source", "joined"], "--source joined needs RUNS"),
        (["--which", "comparison"], "--which comparison needs RUNS"),
        (["RUNS", "--source", "reference"], "takes no RUNS"),
        (["--which", "apf2,contradictions", "--format", "csv"], "different columns"),
        (["--format", "html"], "invalid choice"),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path: Path, capsys, words, says):
    comparison(tmp_path, *pair())
    assert main(["tables", *(str(tmp_path) if w == "RUNS" else w for w in words)]) == 64
    assert says in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error():
    import subprocess
    import sys

    code = f"{sys.executable} -m analysis tables | head -1"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("**APF")
    assert done.stderr == ""


def test_a_name_that_the_terminal_cannot_show(tmp_path: Path, capsys):
    folder = write_run(tmp_path, record())
    (folder / "record.json").write_text(json.dumps(record(experiment="x\ud800y")))
    assert main(["tables", str(tmp_path)]) == 0
    assert "x\ufffdy" in capsys.readouterr().out
