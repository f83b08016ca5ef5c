"""Segmentation and classification in one folder, several data sets, kept records: what must not be mixed is not."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from analysis.__main__ import main
from analysis.comparison.table import compare
from analysis.figures.draw import dice_against_cost, training_curves
from analysis.output.figure_style import style
from analysis.output.formats import escape_html, escape_latex, escape_markdown
from analysis.report.page import page
from analysis.runs.records import load
from tests.helpers.run_folders import record, write_run

NO_DICE = {"dice": None, "dice_per_slide": None, "dice_ceiling": None, "dice_pooled": None}
CLASSES = {**NO_DICE, "task": "classification", "model": "hct", "split_sha256": "cc" * 32}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A segmentation and a classification run, each with its floors and curves."""
    root = tmp_path / "runs"
    run = write_run(root, record("demo_apf", floors={"otsu": 0.2}))
    (run / "metrics.jsonl").write_text('{"step": 1, "train_seconds": 1, "loss": 0.7}\n{"step": 1, "val_dice": 0.4}\n')
    raw = record("hct_image", **CLASSES, accuracy=0.91, auc=0.8, floors={"most_frequent_class": 0.97})
    run = write_run(root, raw)
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "train_seconds": 1, "loss": 0.6}\n{"step": 1, "val_auc": 0.75, "val_accuracy": 0.9}\n'
    )
    return root


def test_an_accuracy_floor_is_no_dice_floor(mixed: Path):
    comparison = compare(load(mixed))
    with style():
        drawing = dice_against_cost(comparison)
    words = [t.get_text() for t in drawing.figure.axes[0].texts]
    assert words == ["Otsu threshold"]
    text = page(comparison, [], mixed.parent)
    top = text[: text.index("</dl>")]
    assert "highest test Dice, demo_apf" in top and "highest test AUC, hct_image" in top
    assert "0.200" in top and "0.970" not in top, "the accuracy floor says nothing about a Dice or an AUC"


def test_each_data_set_has_its_own_best_run_and_floor(tmp_path: Path):
    write_run(tmp_path, record("demo_apf", dice=0.9, floors={"otsu": 0.2}))
    hard = {"resolution": 4096, "split_sha256": "dd" * 32, "floors": {"otsu": 0.95}, "dice": 0.3}
    write_run(tmp_path, record("demo_uniform_tokens", **hard))
    comparison = compare(load(tmp_path))
    text = page(comparison, [], tmp_path)
    top = text[: text.index("</dl>")]
    facts = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", top)
    assert [name for name, _ in facts][1:5] == [
        "highest test Dice, demo_apf, 1,024 px",
        "highest floor of the same data (no learning)",
        "highest test Dice, demo_uniform_tokens, 4,096 px",
        "highest floor of the same data (no learning)",
    ]
    assert [value for _, value in facts][2:5:2] == ["0.200", "0.950"]
    with style():
        drawing = dice_against_cost(comparison)
    words = [t.get_text() for t in drawing.figure.axes[0].texts]
    assert words == ["Otsu threshold, 1,024 px, n=6", "Otsu threshold, 4,096 px, n=6"]


def test_curves_name_the_loss_and_the_score_of_each_task(mixed: Path):
    with style():
        drawing = training_curves(compare(load(mixed)))
    labels = [axis.get_ylabel() for axis in drawing.figure.axes]
    assert labels == ["training loss", "training loss", "Dice, validation", "AUC, validation"]
    assert "segmentation: 0.5 BCE + 0.5 Dice; classification: cross entropy" in drawing.caption
    lines = [[line.get_ydata().tolist() for line in axis.lines] for axis in drawing.figure.axes[2:]]
    assert lines == [[[0.4]], [[0.75]]]


def test_a_classifier_alone_has_no_dice_in_its_caption(tmp_path: Path):
    run = write_run(tmp_path, record("hct_image", **CLASSES, accuracy=0.91))
    (run / "metrics.jsonl").write_text('{"step": 1, "train_seconds": 1, "loss": 0.6}\n{"step": 1, "val_accuracy": 1}\n')
    with style():
        drawing = training_curves(compare(load(tmp_path)))
    assert "Dice" not in drawing.caption and "cross entropy" in drawing.caption
    assert drawing.figure.axes[2].get_ylabel() == "accuracy, validation"


def test_a_collected_run_is_linked_as_the_file_it_is_in(tmp_path: Path):
    write_run(tmp_path / "runs", record())
    study = tmp_path / "kept" / "odd name.jsonl"
    out = tmp_path / "out"
    assert main(["collect", str(tmp_path / "runs"), "--out", str(study)]) == 0
    assert main(["report", str(study), "--out", str(out)]) == 0
    text = (out / "index.html").read_text()
    links = [part.partition('"')[0] for part in text.split('<a href="')[1:]]
    (link,) = [link for link in links if ".jsonl" in link]
    assert (out / unquote(link)).is_file() and "collected run" in text


def test_both_studies_of_a_scaling_sweep_are_kept(tmp_path: Path):
    """Strong and weak runs have one run id on one number of GPUs; only their batches differ."""
    for mode, batch in (("strong", 8), ("weak", 2)):
        write_run(tmp_path, record(global_batch=batch), folder=mode)
    runs = load(tmp_path)
    assert len(runs.ok) == 2 and not runs.problems


@pytest.mark.parametrize("escape", [escape_markdown, escape_latex, escape_html])
def test_what_a_terminal_or_a_reader_would_obey_is_replaced(escape):
    """Colour codes, NUL, and marks that turn the reading direction (so that text reads as other text)."""
    for bad in ("\x1b", "\x00", "\x9b", "\u202e", "\u2066"):
        shown = escape(f"a{bad}b")
        assert bad not in shown and shown in ("a\ufffdb", "a?b")


def test_two_hyphens_stay_two_hyphens_in_latex():
    assert escape_latex("--fit---x") == "-{}-fit-{}-{}-x"
