"""AUC: against every pair, known curves and resampling one by one; the breakdowns of HCT's appendix."""

import math

import numpy as np
import pytest

from analysis.comparison.auc import (
    SIZE_THRESHOLDS_PX,
    auc,
    auc_difference,
    auc_interval,
    below_sizes,
    broken_down,
    finding_types,
    size_thirds,
)
from analysis.runs.stats import BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED


def by_pairs(scores, labels):
    wins = [
        (a > b) + 0.5 * (a == b)
        for a, la in zip(scores, labels, strict=True)
        for b, lb in zip(scores, labels, strict=True)
        if la == 1 and lb == 0
    ]
    return sum(wins) / len(wins) if wins else None


def data(n, seed=0, shift=1.0, levels=None):
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.3).astype(int)
    scores = rng.normal(size=n) + shift * labels
    return (scores if levels is None else np.round(scores * levels)), labels


@pytest.mark.parametrize("levels", [None, 0.5, 2])
@pytest.mark.parametrize("n", [2, 5, 60])
def test_area_is_the_share_of_won_pairs(n, levels):
    for seed in range(5):
        scores, labels = data(n, seed, levels=levels)
        expected = by_pairs(scores, labels)
        assert auc(scores, labels) == (None if expected is None else pytest.approx(expected, abs=1e-15))


def test_known_areas():
    assert auc([1, 2, 3, 4], [0, 0, 1, 1]) == 1 and auc([4, 3, 2, 1], [0, 0, 1, 1]) == 0
    assert auc([7, 7, 7], [0, 1, 1]) == 0.5
    assert auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert auc([1, 2], [1, 1]) is None and auc([], []) is None
    # The trapezoids under the curve, threshold by threshold.
    scores, labels = data(500, levels=3)
    cuts = np.r_[np.inf, np.unique(scores)[::-1]]
    tpr = [(scores[labels == 1] >= c).mean() for c in cuts]
    fpr = [(scores[labels == 0] >= c).mean() for c in cuts]
    assert auc(scores, labels) == pytest.approx(np.trapezoid(tpr, fpr), abs=1e-12)
    # Two normal distributions one deviation apart: Phi(1 / sqrt 2).
    scores, labels = data(200_000, 1)
    assert auc(scores, labels) == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.004)


@pytest.mark.parametrize("levels", [None, 1])
def test_every_resample_is_the_area_of_its_items(levels):
    scores, labels = data(23, 3, levels=levels)
    resamples = 200
    rows = np.random.default_rng(BOOTSTRAP_SEED).integers(0, 23, (resamples, 23))
    areas = [by_pairs(scores[r], labels[r]) for r in rows]
    low, high = np.quantile([a for a in areas if a is not None], [0.025, 0.975])
    found = auc_interval(scores, labels, resamples=resamples)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))
    assert found.value == auc(scores, labels) and found.positives == labels.sum()
    assert found.positives + found.negatives == 23


def test_pieces_change_nothing(monkeypatch):
    scores, labels = data(50)
    whole = auc_interval(scores, labels, resamples=300)
    monkeypatch.setattr("analysis.comparison.auc._DRAWS_AT_ONCE", 170)
    assert auc_interval(scores, labels, resamples=300) == whole


def test_interval_has_the_width_that_theory_gives():
    """Hanley and McNeil (1982): for this area the standard error has a closed form."""
    scores, labels = data(1500, 5)
    found = auc_interval(scores, labels)
    a, p, n = found.value, found.positives, found.negatives
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + (p - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (p * n))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.12)
    assert found.low < a < found.high
    assert auc_interval(scores, labels) == found
    assert BOOTSTRAP_RESAMPLES == 10_000


def test_difference_is_paired():
    rng = np.random.default_rng(0)
    scores, labels = data(400, 2)
    close = scores + 0.01 * rng.normal(size=400)  # nearly the same model: nearly no spread, though each area has some
    same = auc_difference(scores, scores, labels, resamples=500)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    near, alone = auc_difference(scores, close, labels, resamples=500), auc_interval(scores, labels, resamples=500)
    assert near.high - near.low < 0.1 * (alone.high - alone.low)
    worse = auc_difference(scores, rng.normal(size=400), labels, resamples=500)
    assert worse.value == auc(scores, labels) - auc(np.random.default_rng(0).normal(size=(2, 400))[1], labels)
    assert worse.low > 0


def test_one_class_has_no_area_and_no_interval():
    found = auc_interval([1, 2, 3], [0, 0, 0], "none", resamples=50)
    assert (found.value, found.low, found.high, found.positives, found.negatives) == (None, None, None, 0, 3)
    rare = auc_interval([1, 2, 3, 4], [0, 0, 0, 1], resamples=200)  # resamples without the positive do not count
    assert rare.value == rare.low == rare.high == 1


def test_parts_by_size():
    labels = [1, 1, 1, 1, 1, 0, 0]
    sizes = [120, 80, 400, math.nan, 300, math.nan, 50]
    below = below_sizes(labels, sizes)
    assert list(below) == [f"<{t} px" for t in SIZE_THRESHOLDS_PX] and len(below) == 7
    assert below["<100 px"].tolist() == [False, True, False, False, False, True, True]
    assert below["<350 px"].tolist() == [True, True, False, False, True, True, True]
    assert not below["<400 px"][2], "smaller than the threshold, not equal"
    thirds = size_thirds(labels, sizes)
    assert {name: np.flatnonzero(on).tolist() for name, on in thirds.items()} == {
        "small": [0, 1, 5, 6],
        "medium": [4, 5, 6],
        "large": [2, 5, 6],
    }
    equal = size_thirds([1] * 9 + [0], [7] * 10)
    assert [int(on.sum()) for on in equal.values()] == [4, 4, 4]


def test_parts_by_finding_type():
    labels = [1, 1, 1, 0]
    parts = finding_types(labels, [{"mass"}, {"mass", "calcification"}, set(), {"asymmetry"}])
    assert {kind: on.tolist() for kind, on in parts.items()} == {
        "calcification": [False, True, False, True],
        "mass": [True, True, False, True],
    }


def test_broken_down_is_the_area_of_each_part():
    scores, labels = data(300)
    sizes = np.where(labels == 1, np.random.default_rng(1).uniform(50, 500, 300), np.nan)
    masks = size_thirds(labels, sizes)
    areas = broken_down(scores, labels, masks, resamples=200)
    assert [a.name for a in areas] == ["small", "medium", "large"]
    for area, on in zip(areas, masks.values(), strict=True):
        assert area.value == pytest.approx(by_pairs(scores[on], labels[on])) and area.low < area.value < area.high
        assert area.negatives == (labels == 0).sum()
    differences = broken_down(scores, labels, masks, baseline=-scores, resamples=200)
    assert differences[0].value == pytest.approx(2 * areas[0].value - 1)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1, 2], [0, 1, 1], "2 scores do not go with 3 labels"),
        ([1, math.nan], [0, 1], "scores must be finite"),
        ([1, 2], [0, 2], "labels must be a list of 0 and 1"),
    ],
)
def test_what_is_no_data_is_told(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        auc(scores, labels)


def test_it_agrees_with_the_training_metric():
    torch = pytest.importorskip("torch")
    from hpc_models.training.metrics import auc as training_auc

    scores, labels = data(200, levels=2)
    table = torch.tensor(np.stack((-scores, scores), 1))
    assert training_auc(table, torch.tensor(labels)) == pytest.approx(auc(scores, labels), abs=1e-12)
