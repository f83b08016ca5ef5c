import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.__main__ import main
from analysis.comparison.equal_quality import Spent, cost_at, equal_quality, label
from analysis.comparison.item_scores import ItemScores, interval, read_scores
from analysis.comparison.pair import UnfairError, compare_pair, pair_table, read_side
from analysis.output.formats import markdown
from analysis.runs.run_files import Curve, RunFiles, read_curve
from tests.helpers.run_folders import record, write_run

SLIDES = {"a": 0.5, "b": 0.7, "c": 0.9}


def curve(seconds: list[float], dice: list[float]) -> Curve:
    step = np.arange(1.0, len(dice) + 1)
    return Curve(np.empty(0), np.empty(0), np.empty(0), step, np.array(seconds), np.array(dice))


def two(root: Path, a: dict | None = None, b: dict | None = None) -> tuple[Path, Path]:
    """Run folders of an adaptive and a uniform run of equal training, with the changes."""
    shared = {"steps": 100, "dice_per_slide": SLIDES, "dice": 0.7}
    one = write_run(root, record("demo_apf", **{**shared, **(a or {})}), folder="a")
    other = write_run(root, record("demo_uniform_patch", **{**shared, **(b or {})}), folder="b")
    return one, other


def pair(root: Path, a: dict | None = None, b: dict | None = None, unfair_ok: bool = False):
    one, other = two(root, a, b)
    return compare_pair(read_side(one), read_side(other), unfair_ok)


def rows(pair) -> dict:
    return {row.quantity: row for row in pair.rows}


# ---- time to a quality


def test_cost_is_interpolated_in_the_best_value_so_far():
    seconds, dice = [10, 20, 30, 40], [0.2, 0.4, 0.3, 0.8]
    assert cost_at(seconds, dice, 0.3) == Spent(15.0)
    assert cost_at(seconds, dice, 0.4) == Spent(20.0)
    assert cost_at(seconds, dice, 0.6) == Spent(35.0), "the dip at 30 s does not count: 0.4 was reached before"
    assert cost_at(seconds, dice, 0.8) == Spent(40.0)
    assert cost_at(seconds, dice, 0.1) == Spent(10.0, at_most=True)
    assert cost_at(seconds, dice, 0.81) is None


def test_equal_quality_by_hand():
    a = curve([10, 20], [0.0, 0.8])
    b = curve([40, 80, 120], [0.0, 0.2, 0.4])
    (half, full) = equal_quality([a], [b], (0.5, 1.0))
    assert (half.quality, half.a, half.b) == pytest.approx((0.2, 12.5, 80))
    assert (full.quality, full.a, full.b, full.speedup) == pytest.approx((0.4, 15, 120, 8))
    assert (full.low, full.high, label(full)) == (8, 8, "8x")


def test_equal_quality_of_seeds_is_the_geometric_mean_with_the_range_of_pairs():
    a = [curve([1, 11], [0, 1.0]), curve([1, 41], [0, 1.0])]
    b = [curve([1, 81], [0, 1.0])]
    (value,) = equal_quality(a, b, (1.0,))
    assert value.a == pytest.approx(math.sqrt(11 * 41))
    assert value.speedup == pytest.approx(81 / math.sqrt(11 * 41))
    assert (value.low, value.high) == pytest.approx((81 / 41, 81 / 11))


def test_a_quality_that_the_first_evaluation_passed_is_a_bound():
    early, late = curve([10, 20], [0.5, 0.6]), curve([10, 40], [0.1, 0.6])
    (value,) = equal_quality([early], [late], (0.5,))
    assert value.unresolved == "A"
    assert label(value).startswith("at least ")
    (value,) = equal_quality([late], [early], (0.5,))
    assert label(value).startswith("at most ")
    (value,) = equal_quality([early], [curve([30], [0.6])], (0.5,))
    assert label(value) == "?"


def test_no_common_quality_and_no_evaluations_give_nothing():
    some = curve([1, 2], [0.1, 0.2])
    assert equal_quality([some], [curve([1, 2], [0.0, 0.0])]) == []
    assert equal_quality([some], [curve([], [])]) == []
    assert equal_quality([], [some]) == []


CURVES = st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 1)), min_size=1, max_size=8).map(
    lambda steps: curve(np.cumsum([s for s, _ in steps]).tolist(), [d for _, d in steps])
)


@given(CURVES)
def test_equal_quality_of_a_run_against_itself_is_one(one):
    for value in equal_quality([one], [one]):
        assert value.speedup == 1.0
        assert value.low == value.high == 1.0
        assert label(value).endswith(("1x", "1.00x"))


@given(CURVES, CURVES)
def test_equal_quality_turns_round(a, b):
    there, back = equal_quality([a], [b]), equal_quality([b], [a])
    for x, y in zip(there, back, strict=True):
        assert x.quality == y.quality
        assert x.speedup * y.speedup == pytest.approx(1)


def test_an_evaluation_without_a_time_lies_between_the_logged_steps(tmp_path: Path):
    run_dir = write_run(tmp_path, record())
    lines = [
        {"step": 10, "train_seconds": 10.0, "loss": 1.0},
        {"step": 15, "val_dice": 0.2},
        {"step": 20, "train_seconds": 30.0, "loss": 0.5},
        {"step": 20, "val_dice": 0.4},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_curve(RunFiles(run_dir))
    assert found.val_seconds.tolist() == [20.0, 30.0]
    assert found.seconds.tolist() == [10.0, 30.0]


# ---- the comparison


def test_dice_is_paired_over_slides(tmp_path: Path):
    found = rows(pair(tmp_path, b={"dice_per_slide": {"a": 0.4, "b": 0.7, "c": 0.6}, "dice": 1.7 / 3}))
    dice = found["test Dice"]
    assert (dice.a, dice.b, dice.against, dice.n) == pytest.approx((0.7, 1.7 / 3, 0.4 / 3, 3))
    # Differences 0.1, 0, 0.3: the resampled mean is at least 0 and at most 0.3, each with probability 1/27 > 2.5 %.
    assert (dice.low, dice.high) == pytest.approx((0.0, 0.3))
    assert "better on 2, equal on 1 and worse on 0" in dice.note


def test_ratios_say_how_much_less_a_needs(tmp_path: Path):
    fast = {"seconds_per_image": 0.5, "gpus": 2, "train_seconds": 3600.0}
    found = rows(pair(tmp_path, fast, {"seconds_per_image": 4.0}))
    assert found["training s/image"].against == 8.0
    assert found["GPU hours"].a == 2.0


def test_a_number_too_small_to_divide_by_has_no_ratio(tmp_path: Path):
    found = pair(tmp_path, {"seconds_per_image": 1e-320})
    assert rows(found)["training s/image"].against is None
    assert "inf" not in markdown(pair_table(found))


def test_equal_quality_comes_from_metrics(tmp_path: Path):
    one, other = two(tmp_path)
    for folder, times in ((one, (10, 20)), (other, (40, 160))):
        lines = [
            {"step": s, "train_seconds": t, "val_dice": d} for s, t, d in zip((50, 100), times, (0.0, 0.6), strict=True)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare_pair(read_side(one), read_side(other))
    row = rows(found)["training (s) to validation Dice 0.600"]
    assert (row.a, row.b, row.against) == pytest.approx((20, 160, 8))
    assert "8x" in markdown(pair_table(found))
    assert not [name for name in rows(found) if "TFLOP" in name]  # runs that did not count it


def test_arithmetic_to_an_equal_quality_is_interpolated_too(tmp_path: Path):
    one, other = two(tmp_path, {"train_tflop": 6.0}, {"train_tflop": 30.0})
    for folder, per_step in ((one, 0.06), (other, 0.3)):
        lines = [
            {"step": 40, "train_seconds": 4.0, "loss": 1.0, "train_tflop": 40 * per_step},
            {"step": 50, "val_dice": 0.2},
            {"step": 80, "train_seconds": 8.0, "loss": 1.0, "train_tflop": 80 * per_step},
            {"step": 80, "val_dice": 0.6},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = rows(compare_pair(read_side(one), read_side(other)))
    row = found["training (TFLOP) to validation Dice 0.300"]  # a quarter of the way from step 50 to 80
    assert (row.a, row.b, row.against) == pytest.approx((57.5 * 0.06, 57.5 * 0.3, 5))
    assert found["training (s) to validation Dice 0.300"].against == pytest.approx(1)
    assert found["training (TFLOP)"].against == 5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"device_name": "NVIDIA H200"}, "hardware AMD EPYC 7B13 against NVIDIA H200"),
        ({"gpus": 4}, "GPUs 2 against 4"),
        ({"nodes": 2}, "nodes 1 against 2"),
        ({"precision": "bf16"}, "precision fp32 against bf16"),
        ({"attention_backend": "flash"}, "attention backend sdpa (cpu) against flash"),
        ({"split_sha256": "ee"}, "data split"),
        ({"resolution": 2048}, "resolution 1,024 against 2,048".replace(",", "")),
        ({"optimiser": "SGD"}, "optimiser AdamW against SGD"),
        ({"warmup_rule": "none"}, "timing window"),
        ({"steps": 200, "epochs": 24, "train_seconds": 300.0}, "training budget 100 steps, 12.0 epochs, 120 s against"),
        ({"task": "classification"}, "task segmentation against classification"),
        ({"dice_per_slide": {"z": 0.7}}, "other test slides"),
    ],
)
def test_what_differs_is_refused_and_said(tmp_path: Path, changes, says):
    with pytest.raises(UnfairError) as refused:
        pair(tmp_path / "strict", b=changes)
    assert says in str(refused.value)
    assert refused.value.exit_code == 1
    found = pair(tmp_path / "loose", b=changes, unfair_ok=True)
    table = pair_table(found)
    assert "NOT A FAIR COMPARISON" in table.caption
    assert says in table.caption


def test_optimiser_settings_are_part_of_the_optimiser(tmp_path: Path):
    one, other = two(tmp_path)
    (other / "config.yaml").write_text("train: {lr: 0.01, seed: 3}\n")
    with pytest.raises(UnfairError, match=r"optimiser lr 0\.001 against 0\.01"):
        compare_pair(read_side(one), read_side(other))


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 9, "epochs": 12.05, "train_seconds": 500.0},
        {"steps": 9, "epochs": 1, "train_seconds": 123.0},
        {"steps": 100, "epochs": 1, "train_seconds": 500.0},
    ],
    ids=["epochs", "time", "steps"],
)
def test_one_equal_budget_is_enough(tmp_path: Path, changes):
    assert not pair(tmp_path, b=changes).unfair


def test_what_may_differ_is_said(tmp_path: Path):
    found = pair(tmp_path, b={"engine": "ddp", "commit": "ff" * 20})
    notes = " ".join(pair_table(found).notes)
    assert "engine fsdp against ddp" in notes
    assert "code 8cfaba800000 against ffffffffffff" in notes


def test_changed_code_is_said_to_be_changed(tmp_path: Path):
    found = pair(tmp_path, b={"commit": "8cfaba8" + "0" * 33 + "+dirty"})
    notes = " ".join(pair_table(found).notes)
    assert "code 8cfaba800000 against 8cfaba800000+dirty" in notes
    assert "commit 8cfaba800000+dirty; measured" in notes


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("name", "value"), [("precision", None), ("gpus", 4), ("optimiser", None), ("warmup_rule", "")]
)
def test_a_refusal_does_not_depend_on_the_side(tmp_path: Path, name, value, turned):
    """What one record does not say, or says otherwise, refuses the pair whichever side it is on."""
    sides = ({}, {name: value})
    a, b = reversed(sides) if turned else sides
    with pytest.raises(UnfairError):
        pair(tmp_path, a, b)


@settings(max_examples=20)
@given(st.dictionaries(st.text("abc", min_size=1), st.floats(0, 1), min_size=1, max_size=6), st.floats(1e-3, 1e3))
def test_a_run_against_itself(slides, seconds):
    with tempfile.TemporaryDirectory() as root:
        raw = record(dice_per_slide=slides, seconds_per_image=seconds, precision=None, steps=16)
        side = read_side(write_run(Path(root), raw, metrics=True))
        found = rows(compare_pair(side, side))
    assert found["test Dice"].against == 0
    assert {row.against for row in found.values() if row.kind == "ratio"} == {1.0}


def test_seeds_of_one_experiment_are_one_side(tmp_path: Path):
    for seed in (0, 1):
        write_run(tmp_path / "e", record(seed=seed))
    side = read_side(tmp_path / "e")
    assert len(side.runs) == 2
    found = compare_pair(side, side)
    assert any("mean of 2 seeds" in note for note in pair_table(found).notes)


# ---- classification


def scores(labels: list[int], positive: list[float]) -> ItemScores:
    p = np.array(positive)
    return ItemScores(tuple(f"s{i}" for i in range(p.size)), np.array(labels), np.stack([1 - p, p], axis=1))


def test_accuracy_and_auc_by_hand():
    a = scores([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9])
    assert interval("accuracy", [a]).value == 0.5
    assert interval("auc", [a]).value == 0.75
    b = scores([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9])
    gap = interval("auc", [b], [a])
    assert gap.value == 0.25
    assert gap.n == 4
    itself = interval("auc", [a], [a])
    assert (itself.value, itself.low, itself.high) == (0, 0, 0)
    assert interval("accuracy", [a, b], [a]).value == 0.25, "mean of the seeds of a side"


def test_other_items_are_not_paired():
    a = scores([0, 1], [0.1, 0.9])
    assert interval("auc", [a], [scores([1, 0], [0.1, 0.9])]) is None
    assert interval("auc", [a, a], [a]) is None


def test_scores_are_read_in_the_order_of_names_or_not_at_all(tmp_path: Path):
    folder = write_run(tmp_path, record())
    (folder / "predictions").mkdir()
    path = folder / "predictions" / "scores.csv"
    path.write_text("name,label,p0,p1\nb,1,0.2,0.8\na,0,0.7,0.3\n")
    found = read_scores(RunFiles(folder))
    assert found.names == ("a", "b")
    assert found.labels.tolist() == [0, 1]
    assert found.right.tolist() == [1.0, 1.0]
    for bad in ("", "name,label,p0,p1\n", "h\na,0\n", "h\na,2,0.1,0.9\n", "h\na,0,x,1\n", "h\na,0,1,0\na,0,1,0\n"):
        path.write_text(bad)
        assert read_scores(RunFiles(folder)) is None, bad


def test_classification_is_compared(tmp_path: Path):
    plain = {"dice": None, "dice_per_slide": None, "dice_ceiling": None, "task": "classification"}
    one, other = two(tmp_path, {**plain, "accuracy": 1.0, "auc": 1.0}, {**plain, "accuracy": 0.5, "auc": 0.75})
    for folder, lines in ((one, ("0.9", "0.8", "0.2", "0.1")), (other, ("0.9", "0.4", "0.6", "0.1"))):
        (folder / "predictions").mkdir()
        text = "name,label,p0,p1\n" + "".join(f"s{i},{i // 2},{p},{1 - float(p):.1f}\n" for i, p in enumerate(lines))
        (folder / "predictions" / "scores.csv").write_text(text)
    found = rows(compare_pair(read_side(one), read_side(other)))
    assert found["test AUC"].against == 0.25
    assert found["test accuracy"].against == 0.5
    assert found["test accuracy"].n == 4
    assert "test Dice" not in found


# ---- command line


def test_command_line_writes_all_forms(tmp_path: Path, capsys):
    one, other = two(tmp_path)
    out = tmp_path / "out"
    assert main(["compare", str(one), str(other / "record.json"), "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["compare.csv", "compare.json", "compare.md", "compare.tex"]
    assert (out / "compare.md").read_text() == capsys.readouterr().out
    data = json.loads((out / "compare.json").read_text())
    assert data["fair"] is True
    assert {row["quantity"] for row in data["rows"]} >= {"test Dice", "training s/image"}
    assert "toprule" in (out / "compare.tex").read_text()


def test_refusal_is_one_line_and_exit_1(tmp_path: Path, capsys):
    one, other = two(tmp_path, b={"gpus": 64, "precision": "bf16"})
    assert main(["compare", str(one), str(other), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: A and B must not be compared: GPUs 2 against 64; precision fp32 against bf16")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["compare", str(one), str(other), "--unfair-ok", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unfair"] == ["GPUs 2 against 64", "precision fp32 against bf16"]


def bad_record(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "record.json").write_text(text)


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (lambda p: None, 64, "no such folder"),
        (lambda p: p.mkdir(), 1, "no record.json"),
        (lambda p: write_run(p, record(status="oom", reason="too long")), 1, "oom: too long"),
        (lambda p: [write_run(p, record(n)) for n in ("demo_apf", "demo_uniform_patch")], 64, "2 experiments"),
        (lambda p: bad_record(p, "{"), 1, "not whole JSON"),
        (lambda p: bad_record(p, json.dumps({"schema_version": 0})), 1, "schema_version is 0"),
        (lambda p: p.write_text("{"), 64, "not a folder"),
    ],
    ids=["gone", "empty", "failed", "many", "broken", "older", "file"],
)
def test_sides_that_cannot_be_read(tmp_path: Path, capsys, make, code, says):
    good = write_run(tmp_path, record(), folder="good")
    make(tmp_path / "bad")
    assert main(["compare", str(good), str(tmp_path / "bad")]) == code
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
