"""`python -m analysis auc`: a run, two runs paired, findings, and what is refused in one line."""

import csv

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.comparison.auc import auc


def write(folder, scores, labels, names=None):
    """A run folder with the scores of its test items."""
    names = names or [f"m{i}" for i in range(len(labels))]
    (folder / "predictions").mkdir(parents=True)
    rows = [f"{n},{y},{1 - p!r},{p!r}" for n, y, p in zip(names, labels, scores, strict=True)]
    (folder / "predictions" / "scores.csv").write_text("name,label,p0,p1\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    labels = [int(v) for v in rng.random(120) < 0.4]
    good, poor = ([float(v) for v in rng.random(120) * (1 - w) + w * np.array(labels)] for w in (0.5, 0.1))
    write(tmp_path / "good", good, labels)
    order = [int(i) for i in rng.permutation(120)]  # the other run's items stand in another order
    write(tmp_path / "poor", [poor[i] for i in order], [labels[i] for i in order], [f"m{i}" for i in order])
    rows = [f"m{i},{80 + 5 * i},{'mass;asymmetry' if i % 2 else 'mass'}" for i in range(110) if labels[i]]
    (tmp_path / "findings.csv").write_text("name,size_px,types\n" + "\n".join(rows) + "\n")
    return tmp_path, np.array(good), np.array(poor), np.array(labels)


def table(folder):
    with (folder / "auc.csv").open() as file:
        return list(csv.DictReader(file))


def test_area_of_a_run(runs, capsys):
    root, good, _, labels = runs
    assert main(["auc", str(root / "good")]) == 0
    out = capsys.readouterr().out
    assert f"{auc(good, labels):.4f}" in out and "10,000 resamples" in out
    assert main(["auc", str(root / "good" / "predictions" / "scores.csv"), "--positive", "0"]) == 0
    assert f"{auc(1 - good, 1 - labels):.4f}" in capsys.readouterr().out


def test_difference_is_over_the_same_items_whatever_their_order(runs):
    root, good, poor, labels = runs
    words = ["auc", str(root / "good"), "--baseline", str(root / "poor"), "--out", str(root / "out")]
    assert main([*words, "--findings", str(root / "findings.csv")]) == 0
    rows = {(row["what"], row["items"]): row for row in table(root / "out")}
    assert float(rows["AUC", "all"]["AUC"]) == pytest.approx(auc(good, labels))
    difference = rows["difference", "all"]
    assert float(difference["AUC"]) == pytest.approx(auc(good, labels) - auc(poor, labels))
    assert float(difference["low"]) > 0 and int(difference["positives"]) == labels.sum()
    small = (labels == 0) | (80 + 5 * np.arange(120) < 200) & (np.arange(120) < 110)
    assert float(rows["AUC", "<200 px"]["AUC"]) == pytest.approx(auc(good[small], labels[small]))
    odd = (labels == 0) | (np.arange(120) % 2 == 1) & (np.arange(120) < 110)
    part = rows["difference", "asymmetry"]
    assert float(part["AUC"]) == pytest.approx(auc(good[odd], labels[odd]) - auc(poor[odd], labels[odd]))
    expected = {"all", "small", "medium", "large", "asymmetry", "mass", *(f"<{t} px" for t in range(100, 401, 50))}
    assert {name for what, name in rows if what == "difference"} == expected
    assert sorted(p.name for p in (root / "out").iterdir()) == ["auc.csv", "auc.md", "auc.tex"]


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["auc", "{}/nowhere"], 1, "nowhere: No such file"),
        (["auc", "{}/bad.csv"], 1, "bad.csv: needs a header line with the columns name, label, p0"),
        (["auc", "{}/text.csv"], 1, "text.csv: could not convert string to float"),
        (["auc", "{}/nan.csv"], 1, "nan.csv: a score is not finite"),
        (["auc", "{}/twice.csv"], 1, "twice.csv: a name stands there twice"),
        (["auc", "{}/good", "--positive", "2"], 64, "--positive 2:"),
        (["auc", "{}/good", "--baseline", "{}/few.csv"], 1, "few.csv: not scored on the same items as"),
        (["auc", "{}/few.csv", "--baseline", "{}/other.csv"], 1, "other.csv: has other labels than"),
        (["auc", "{}/good", "--findings", "{}/few.csv"], 1, "needs a header line with the columns name, size_px"),
        (["auc", "{}/good", "--findings", "{}/unknown.csv"], 1, "none of its names is among the 120 scored items"),
        (["auc", "{}/good", "--findings", "{}/size.csv"], 1, "size.csv: size_px: could not convert"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(runs, capsys, words, code, line):
    root = runs[0]
    head = "name,label,p0,p1\n"
    for name, text in {
        "bad": "a,b\n1,2\n",
        "text": head + "x,1,0.5,much\n",
        "nan": head + "x,1,0.5,nan\n",
        "twice": head + "x,1,0.5,0.5\nx,0,0.5,0.5\n",
        "few": head + "x,1,0.5,0.5\ny,0,0.1,0.9\n",
        "other": head + "x,0,0.5,0.5\ny,1,0.1,0.9\n",
        "unknown": "name,size_px,types\nq,10,mass\n",
        "size": "name,size_px,types\nm0,large,mass\n",
    }.items():
        (root / f"{name}.csv").write_text(text)
    assert main([word.format(root) for word in words]) == code
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and line in errors[0]
