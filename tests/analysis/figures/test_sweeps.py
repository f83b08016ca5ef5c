"""Sequence length against split value: exponents by hand, files read, the command."""

import shutil

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.figures.sweeps import Sweep, by_patch, by_split_value, read_rows, split_values
from data_prep.__main__ import main as build
from tests.helpers.repository import ROOT

IMAGES = ROOT / "data_prep" / "sample_data" / "glomeruli24" / "images"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three slides at 256 px, built with three split values."""
    root = tmp_path_factory.mktemp("sweep")
    slides = root / "slides"
    slides.mkdir()
    for path in sorted(IMAGES.iterdir())[:3]:
        shutil.copy(path, slides / path.name)
    out = []
    for value in (10, 20, 40):
        out.append(root / f"v{value}")
        words = ["build", str(slides), "--out", str(out[-1]), "--resolution", "256", "--patch", "4"]
        assert build([*words, "--split-value", str(value)]) == 0
    words = ["build", str(slides), "--out", str(root / "budget"), "--resolution", "256", "--patch", "4"]
    assert build([*words, "--length", "64"]) == 0
    return out


def test_a_power_law_has_its_exponent():
    """L = 1000 / v on every slide: -1, and no spread; with slides that differ by a factor the same."""
    sweep = Sweep(512, 4, {v: np.array([1000.0, 3000.0]) / v for v in (10, 20, 50)})
    assert sweep.exponent() == pytest.approx((-1, -1, -1))
    assert Sweep(512, 4, {10: np.array([5])}).exponent() is None
    mixed = Sweep(512, 4, {v: np.array([1000 / v, 1000 / v**0.5]) for v in (10, 20, 50)})
    own, low, high = mixed.exponent()
    assert low == pytest.approx(-1) and high == pytest.approx(-0.5) and low < own < high


def test_files_are_read_by_setting_and_lengths_fall(folders, capsys, tmp_path):
    rows = read_rows(folders)
    (sweep,) = by_split_value(rows)
    assert (sweep.resolution, sweep.fixed) == (256, 4) and sweep.values.tolist() == [10, 20, 40]
    means = [sweep.lengths[v].mean() for v in (10, 20, 40)]
    assert means == sorted(means, reverse=True) and all(len(x) == 3 for x in sweep.lengths.values())
    assert main(["lengths", *map(str, folders), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"{means[0]:,.1f}" in shown and "exponent" in shown
    assert (tmp_path / "split_values.png").stat().st_size > 10_000
    labels = [t.get_text() for t in split_values(rows).figure.axes[0].get_legend().get_texts()]
    assert len(labels) == 2 and labels[0].startswith("256 px, p=4, n=3") and labels[1].startswith("published means")


def test_the_smallest_patch_has_a_panel_and_an_exponent_of_its_own():
    """L = 4096 / p at either split value, and one slide that only one setting has."""
    rows = [(512, p, v, name, n * 4096 // p) for p in (4, 8, 16) for v in (20, 50) for name, n in (("a", 1), ("b", 3))]
    rows.append((512, 4, 20, "only here", 10**6))
    for sweep in by_patch(rows):
        assert sweep.slides == 2 and sweep.exponent() == pytest.approx((-1, -1, -1))
    assert [s.fixed for s in by_patch(rows)] == [20, 50] and [s.fixed for s in by_split_value(rows)] == [4, 8, 16]
    drawing = split_values(rows)
    assert len(drawing.figure.axes) == 2 and drawing.alt.count("L ~ p^-1.00") == 2
    labels = [t.get_text() for t in drawing.figure.axes[1].get_legend().get_texts()]
    assert labels[-1] == "slope of uniform patches: p^-2"


def test_what_has_no_split_value_is_refused(folders, tmp_path, capsys):
    assert main(["lengths", str(folders[0].parent / "budget")]) == 64
    assert "no token file built with --split-value" in capsys.readouterr().err
    assert main(["lengths", str(tmp_path / "nothing")]) == 64
    assert "no such folder" in capsys.readouterr().err
