"""Adaptive against uniform over numbers of GPUs, classifiers against cost, and axes and legends that can be read."""

import json
from pathlib import Path

import numpy as np
import pytest

from analysis.comparison.table import compare, comparison_table
from analysis.figures.cost import accuracy_against_cost
from analysis.figures.draw import draw_all
from analysis.figures.scaling import series_of
from analysis.figures.uniform import measured_against_uniform, rivals_of
from analysis.output.figure_style import encode, legend_below, new_figure, plain_log, style
from analysis.runs.groups import group_runs
from analysis.runs.records import load, rows_of
from tests.helpers.run_folders import record, rows_in, runs_in, write_run

APF, UNIFORM = "demo_apf", "demo_uniform_patch"


def study(root: Path, mode: str, seeds=(0, 1), counts=(1, 2, 4), names=(APF, UNIFORM)) -> None:
    """A scaling study: adaptive in 0.1 s / N, uniform in 1 s / N ** 0.5, the second seed 10 % slower."""
    for name in names:
        for n in counts:
            for seed in seeds:
                seconds = (0.1 / n if name == APF else 1 / n**0.5) * (1 + 0.1 * seed)
                raw = record(
                    name,
                    seed=seed,
                    gpus=n,
                    nodes=-(-n // 2),
                    global_batch=4 if mode == "strong" else n,
                    seconds_per_image=seconds,
                    run_id=f"{name}_g{n}_s{seed}",
                )
                write_run(root, raw, folder=f"scaling-{mode}/{name}/{raw['run_id']}")


def test_speedup_over_uniform_by_hand(tmp_path: Path):
    study(tmp_path, "strong")
    (rivals,), alone = rivals_of(compare(load(tmp_path)))
    assert alone == 0 and rivals.gpus == (1, 2, 4) and rivals.nodes == (1, 1, 2)
    np.testing.assert_allclose(rivals.speedup, [10, 10 * 2**0.5, 20])
    np.testing.assert_allclose(rivals.bars, np.array([[1 - 1 / 1.1], [0.1]]) * rivals.speedup)
    assert rivals.label == "demo_apf (apf, fsdp), strong" and rivals.rival.startswith("demo_uniform_patch (uniform")
    drawing = measured_against_uniform(compare(load(tmp_path)))
    assert "20.00 times faster on 4 GPUs" in drawing.alt and "n = 2 a point" in drawing.caption
    left, right = drawing.figure.axes
    assert [t.get_text() for t in left.get_xticklabels()] == ["1\n(1)", "2\n(1)", "4\n(2)"]
    assert right.get_ylim()[0] == 0 and right.get_ylim()[1] > 22


def test_strong_and_weak_rivals_keep_their_batch(tmp_path: Path):
    """Both studies in one folder: each adaptive row is divided by the uniform row of its own batch."""
    study(tmp_path, "strong", seeds=(0,))
    study(tmp_path, "weak", seeds=(0,))
    comparison = compare(load(tmp_path))
    for row in comparison.rows:
        assert comparison.by_label[row.baseline].global_batch == row.global_batch
        assert not row.remarks
    rivals, _ = rivals_of(comparison)
    assert sorted(r.label.rpartition(", ")[2] for r in rivals) == ["strong", "weak"]


def test_a_point_without_a_fair_rival_is_counted_not_drawn(tmp_path: Path):
    study(tmp_path, "strong", counts=(1, 2))
    study(tmp_path, "strong", counts=(4,), names=(APF,))
    comparison = compare(load(tmp_path))
    (rivals,), alone = rivals_of(comparison)
    assert rivals.gpus == (1, 2) and alone == 1
    assert "1 adaptive points have no fair uniform rival" in measured_against_uniform(comparison).caption


def test_rows_of_a_study_are_called_after_their_gpus(tmp_path: Path):
    study(tmp_path, "strong", counts=(1, 2), names=(APF,))
    study(tmp_path, "weak", counts=(4,), names=(APF,))
    write_run(tmp_path, record(UNIFORM, gpus=2))
    write_run(tmp_path, record(UNIFORM, gpus=2, patch=32, run_id="other"))
    comparison = compare(load(tmp_path))
    labels = [row.label for row in comparison.rows]
    assert labels[:3] == ["demo_apf, 1 GPU", "demo_apf, 2 GPUs", "demo_apf, 4 GPUs"]
    assert labels[4] == "demo_uniform_patch/other", "what differs in more than its GPUs keeps its run id"
    table = comparison_table(comparison)
    gpus = [c.head for c in table.columns].index("GPUs")
    assert [row[gpus] for row in table.rows[:3]] == ["1", "2", "4"]


def test_one_number_of_gpus_is_no_such_figure(tmp_path: Path):
    study(tmp_path, "strong", counts=(2,))
    assert measured_against_uniform(compare(load(tmp_path))) is None


def test_lines_do_not_depend_on_the_order_of_records(tmp_path: Path):
    study(tmp_path, "strong")
    runs = load(tmp_path).ok
    expected = [(s.label, s.gpus, s.seconds) for s in series_of(rows_of(group_runs(runs)))]
    for seed in range(5):
        shuffled = runs.sample(frac=1, random_state=seed)
        assert [(s.label, s.gpus, s.seconds) for s in series_of(rows_of(group_runs(shuffled)))] == expected


def test_trainings_of_one_name_that_differ_are_different_lines(tmp_path: Path):
    """A sweep over L keeps the experiment's name; no point of one length may stand on the line of another."""
    for length in (256, 1024):
        for n in (1, 2):
            raw = record(
                APF, gpus=n, global_batch=4, length=length, seconds_per_image=length / n, run_id=f"L{length}_g{n}"
            )
            write_run(tmp_path, raw)
    series = series_of(rows_in(tmp_path))
    assert [s.label for s in series] == ["demo_apf (apf, fsdp, L=1024)", "demo_apf (apf, fsdp, L=256)"]
    assert [s.seconds for s in series] == [((1024.0,), (512.0,)), ((256.0,), (128.0,))]


def test_bars_of_the_speedup_are_those_of_the_seeds(tmp_path: Path):
    study(tmp_path, "strong", counts=(1, 2), names=(APF,))
    (series,) = [s for s in series_of(rows_in(tmp_path)) if s.kind == "strong"]
    np.testing.assert_allclose(series.speedup - series.bars[0], [1.05 / 1.1, 2 * 1.05 / 1.1])
    np.testing.assert_allclose(series.speedup + series.bars[1], [1.05, 2 * 1.05])


def test_classifiers_against_cost(tmp_path: Path):
    plain = {"dice": None, "dice_per_slide": None, "dice_ceiling": None, "task": "classification", "n_test": 4}
    floors = {"most_frequent_class": 0.6}
    for name, accuracy in (("hct_image", 0.75), ("gmic_image", 0.5)):
        raw = record(name, **plain, model=name[:3], accuracy=accuracy, auc=0.75, floors=floors)
        folder = write_run(tmp_path, raw) / "predictions"
        folder.mkdir()
        rows = ["s0,0,0.9,0.1", "s1,0,0.4,0.6", "s2,1,0.6,0.4" if accuracy == 0.5 else "s2,1,0.4,0.6", "s3,1,0.1,0.9"]
        (folder / "scores.csv").write_text("name,label,p0,p1\n" + "\n".join(rows) + "\n")
    comparison = compare(load(tmp_path))
    with style():
        drawing = accuracy_against_cost(comparison)
    left, right = drawing.figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("Accuracy, test items", "AUC, test items")
    assert "hct_image: Accuracy 0.750" in drawing.alt and "n = 4 items" in drawing.caption
    assert "most frequent class" in drawing.caption
    points = {tuple(line.get_ydata()) for line in left.lines if line.get_marker() not in ("None", None)}
    assert points == {(0.75,), (0.5,)}
    assert 0.6 in {line.get_ydata()[0] for line in left.lines} and 0.5 in {line.get_ydata()[0] for line in right.lines}
    slugs = {d.slug for d in draw_all(comparison)}
    assert "accuracy_against_cost" in slugs and "dice_against_cost" not in slugs


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.26), (0.15, 0.6), (3, 40), (0.01, 2), (1e-5, 3e3)])
def test_every_range_of_a_logarithmic_axis_has_labels(low: float, high: float):
    with style():
        figure = new_figure(3, 2)
        axis = figure.subplots()
        axis.plot([1, 2], [low, high])
        axis.set_yscale("log")
        plain_log(axis.yaxis)
        figure.draw_without_rendering()
        shown = [t.get_text() for t in axis.get_yticklabels() if low <= t.get_position()[1] <= high and t.get_text()]
    assert 2 <= len(shown) <= 12 and not any("e" in text or "$" in text for text in shown)


def test_long_names_do_not_widen_a_figure():
    with style():
        figure = new_figure(7.1, 2)
        axis = figure.subplots()
        handles = [axis.plot([1, 2])[0] for _ in range(4)]
        legend_below(figure, handles, [f"experiment_with_a_long_name/run_with_a_long_id_{i}" for i in range(4)])
        svg = encode(figure, "svg").decode()
    width_pt = float(svg.partition('width="')[2].partition("pt")[0])
    assert width_pt < 7.3 * 72


def test_seeds_of_both_studies_load_in_any_order(tmp_path: Path):
    study(tmp_path, "strong", seeds=(0,), counts=(2,), names=(APF,))
    study(tmp_path, "weak", seeds=(0,), counts=(2,), names=(APF,))
    found = load(tmp_path)
    assert len(found.ok) == 2 and not found.problems
    assert {json.loads((r.folder / "record.json").read_text())["global_batch"] for r in runs_in(tmp_path)} == {2, 4}
