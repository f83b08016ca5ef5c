"""Relative gains of Dice over data sets, against hand-computed cases."""

import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.__main__ import main
from analysis.comparison.gains import find_pairs, gains
from analysis.comparison.speedups import differences
from analysis.runs.groups import group_runs
from analysis.runs.records import RunsError, load, rows_of
from tests.helpers.run_folders import STEMS, record, write_run


def runs_of(tmp_path, dice: dict[str, list[float]], seeds: int = 1) -> pd.DataFrame:
    for name, values in dice.items():
        for seed in range(seeds):
            # every seed is off by as much, so that their mean is as given
            per_slide = {s: v + (seed - (seeds - 1) / 2) * 0.02 for s, v in zip(STEMS, values, strict=False)}
            raw = record(
                "demo_apf",
                experiment=name,
                seed=seed,
                run_id=f"r{seed}",
                dice_per_slide=per_slide,
                dice=float(np.mean(list(per_slide.values()))),
            )
            write_run(tmp_path, raw)
    return group_runs(load(tmp_path).ok)


def test_hand_computed(tmp_path):
    groups = runs_of(
        tmp_path,
        {
            "open_x_apf": [0.6, 0.4],
            "open_x_unet": [0.5, 0.3],
            "open_y_apf": [0.9, 0.9],
            "open_y_unet": [0.45, 0.45],
            "open_z_apf": [0.5, 0.5],
            "open_x_apf_token": [0.1, 0.1],
        },
    )
    pairs = find_pairs(groups, "open_*_apf", "open_*_unet")
    assert [name for name, _, _ in pairs] == ["x", "y"]
    x, y, both = gains(pairs)
    assert (x.gain, y.gain) == (pytest.approx(0.25), pytest.approx(1.0)) and (x.n, x.better) == (2, 2)
    assert both.gain == pytest.approx((1.25 * 2) ** 0.5 - 1) and both.n == 2
    # Two slides: resamples are both, or one of them twice.
    assert (x.low, x.high) == (pytest.approx(0.2), pytest.approx(1 / 3))
    assert (y.low, y.high) == (pytest.approx(1.0), pytest.approx(1.0))
    assert (both.low, both.high) == (pytest.approx((1.2 * 2) ** 0.5 - 1), pytest.approx((4 / 3 * 2) ** 0.5 - 1))


def test_seeds_are_drawn_for_each_row_by_itself(tmp_path):
    groups = runs_of(tmp_path, {"open_x_apf": [0.5, 0.5], "open_x_unet": [0.3, 0.3]}, seeds=3)
    (row,) = gains(find_pairs(groups, "open_*_apf", "open_*_unet"))
    # All slides are alike, and seeds are off by -0.02, 0 and 0.02: the mean of three draws is off by i * 0.02 / 3.
    assert row.gain == pytest.approx(0.5 / 0.3 - 1)
    ratios = {}
    for i, p in ((-3, 1), (-2, 3), (-1, 6), (0, 7), (1, 6), (2, 3), (3, 1)):
        for j, q in ((-3, 1), (-2, 3), (-1, 6), (0, 7), (1, 6), (2, 3), (3, 1)):
            key = (0.5 + i * 0.02 / 3) / (0.3 + j * 0.02 / 3) - 1
            ratios[key] = ratios.get(key, 0) + p * q / 27**2
    ends, total = [], 0.0
    for key in sorted(ratios):
        total += ratios[key]
        ends.append((total, key))
    low = next(key for total, key in ends if total >= 0.025)
    high = next(key for total, key in ends if total >= 0.975)
    assert (row.low, row.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert row.low < row.gain - 0.05 and row.high > row.gain + 0.05


def test_a_row_that_learned_less_than_a_rule_without_learning_is_named(tmp_path):
    for name, dice, otsu in (("open_x_apf", 0.6, 0.3), ("open_x_unetr", 0.3, 0.3), ("open_x_unet", 0.31, 0.3)):
        raw = record(
            "demo_apf",
            experiment=name,
            run_id="r",
            dice=dice,
            dice_per_slide=dict.fromkeys(STEMS, dice),
            floors={"all_foreground": 0.2, "otsu": otsu},
        )
        write_run(tmp_path, raw)
    groups = group_runs(load(tmp_path).ok)
    (low,), (high,) = (gains(find_pairs(groups, "open_*_apf", f"open_*_{row}")) for row in ("unetr", "unet"))
    assert low.note == "one seed; B is not above Otsu threshold (0.300)" and high.note == "one seed"
    (turned,) = gains(find_pairs(groups, "open_*_unetr", "open_*_apf"))
    assert turned.note == "one seed; A is not above Otsu threshold (0.300)"


def test_nothing_found(tmp_path):
    groups = runs_of(tmp_path, {"a_x": [0.0, 0.0], "b_x": [0.5, 0.1], "a_y": [0.3, 0.2], "b_y": [0.6, 0.4]})
    x, y, both = gains(find_pairs(groups, "b_*", "a_*"))
    assert x.gain is None and x.low is None and y.gain == pytest.approx(1.0)
    assert both.gain is None and "0 on x" in both.note
    x, _, both = gains(find_pairs(groups, "a_*", "b_*"))
    assert x.gain == -1 and both.gain == -1
    with pytest.raises(RunsError, match="no data set"):
        find_pairs(groups, "a_*", "c_*")


def test_scores_of_other_pixels_are_not_divided(tmp_path, capsys):
    for name, floor in (("open_x_apf", 0.16), ("open_x_unet", 0.14), ("open_x_unetr", 0.16)):
        raw = record(
            "demo_apf",
            experiment=name,
            run_id="r",
            dice_per_slide={STEMS[0]: 0.5, STEMS[1]: 0.4},
            floors={"all_foreground": floor},
        )
        write_run(tmp_path, raw)
    groups = group_runs(load(tmp_path).ok)
    with pytest.raises(RunsError, match="open_x_apf and open_x_unet were scored on other pixels of the same slides"):
        find_pairs(groups, "open_*_apf", "open_*_unet")
    assert len(find_pairs(groups, "open_*_apf", "open_*_unetr")) == 1
    assert main(["gains", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out.count("Relative gain") == 1, "one rival of the two"
    (left_out,) = said.err.splitlines()
    assert left_out.startswith("left out: open_*_apf over open_*_unet: open_x_apf and open_x_unet were scored on other")
    # A set that can be compared is not lost with the other.
    for name, floor in (("open_y_apf", 0.16), ("open_y_unet", 0.16)):
        write_run(
            tmp_path,
            record(
                "demo_apf",
                experiment=name,
                run_id="r",
                dice_per_slide={STEMS[0]: 0.5},
                floors={"all_foreground": floor},
            ),
        )
    refused: list[RunsError] = []
    ((name, _, _),) = find_pairs(group_runs(load(tmp_path).ok), "open_*_apf", "open_*_unet", refused)
    assert name == "y" and [str(error) for error in refused] == [left_out.split(": ", 2)[2]]
    assert main(["gains", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out.count("Relative gain") == 2 and said.err.splitlines() == [left_out]
    by_name = {row.experiment: row for row in rows_of(groups)}
    assert "other test pixels" in differences(by_name["open_x_apf"], by_name["open_x_unet"])
    assert "other test pixels" not in differences(by_name["open_x_apf"], by_name["open_x_unetr"])


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6))
def test_against_itself_is_nothing(tmp_path_factory, values):
    (group,) = rows_of(runs_of(tmp_path_factory.mktemp("runs"), {"open_x_apf": values}))
    (row,) = gains([("x", group, group)])
    assert (row.gain, row.low, row.high, row.better) == (0, 0, 0, 0)


def test_what_is_left_out_and_other_budgets_are_told(tmp_path, capsys):
    for name, seconds in (("open_x_apf", 300.0), ("open_x_unet", 150.0), ("open_x_unetr", 301.0)):
        write_run(
            tmp_path,
            record(
                "demo_apf",
                experiment=name,
                run_id="r",
                train_seconds=seconds,
                steps=seconds,
                epochs=seconds,
                dice_per_slide={STEMS[0]: 0.5, STEMS[1]: 0.4},
            ),
        )
    lost = {"run_id": "lost", "seed": 1, "status": "oom", "reason": "full"}
    write_run(tmp_path, record("demo_apf", experiment="open_x_unet", **lost))
    assert main(["gains", str(tmp_path)]) == 0
    said = capsys.readouterr()
    (row,) = (line for line in said.out.splitlines() if "one seed" in line and "300 and 150 s" in line)
    assert "trained for" in row and said.out.count("Relative gain") == 2
    assert "lost: oom: full" in said.err
    # another setting of a row that only looks alike is no hindrance to the others
    for lr in (1, 2):
        write_run(
            tmp_path,
            record(
                "demo_apf",
                experiment="open_x_uniform_leaf_unet",
                run_id=f"r{lr}",
                global_batch=lr,
                dice_per_slide={STEMS[0]: 0.5, STEMS[1]: 0.4},
            ),
        )
    assert main(["gains", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "left out: open_*_apf over open_*_uniform_leaf_unet: open_x_uniform_leaf_unet: its runs" in said.err
    assert said.out.count("Relative gain") == 2
    assert main(["gains", str(tmp_path), "--b", "open_*_uniform_leaf_unet"]) == 1
    for name in ("open_x_unet", "open_x_unetr"):
        shutil.rmtree(tmp_path / name)
    assert main(["gains", str(tmp_path)]) == 1 and "nothing is left to compare" in capsys.readouterr().err


def test_command(tmp_path, capsys):
    runs_of(tmp_path / "runs", {"open_x_apf": [0.6, 0.4], "open_x_unet": [0.5, 0.3]})
    assert main(["gains", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "+25.0 % [+20.0 %, +33.3 %]" in text and "2 of 2" in text and text.count("Relative gain") == 1
    assert (tmp_path / "out/gains.md").read_text() == text and "25.0" in (tmp_path / "out/gains.tex").read_text()
    assert main(["gains", str(tmp_path / "runs"), "--b", "open_*_unetr"]) == 66
    assert "no data set has finished runs of both" in capsys.readouterr().err
    assert main(["gains", str(tmp_path / "runs"), "--a", "open_apf"]) == 64
