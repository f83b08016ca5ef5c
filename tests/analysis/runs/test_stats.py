import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.runs.stats import BOOTSTRAP_RESAMPLES, bootstrap_interval, geomean, mean


def test_mean_leaves_out_what_is_missing():
    assert mean([1.0, None, 3.0]) == 2.0
    assert mean([None, None]) is None
    assert mean([]) is None


def test_geomean_by_hand():
    assert geomean([2, 8]) == pytest.approx(4)
    assert geomean([1, 10, 100]) == pytest.approx(10)


@pytest.mark.parametrize("bad", [[], [1.0, 0.0], [2.0, -1.0]])
def test_geomean_refuses(bad):
    with pytest.raises(ValueError, match="positive"):
        geomean(bad)


@given(st.floats(0, 1), st.integers(2, 40))
def test_bootstrap_of_a_constant_is_the_constant(value, n):
    assert bootstrap_interval([value] * n) == (value, value)


def test_bootstrap_needs_two_slides():
    assert bootstrap_interval([0.5]) is None
    assert bootstrap_interval([]) is None


def test_bootstrap_of_two_values_by_hand():
    # Slides 0 and 1: the resampled mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4; 2.5 % and 97.5 % are its ends.
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    # At 40 % the interval is inside the middle half.
    assert bootstrap_interval([0.0, 1.0], level=0.4) == (0.5, 0.5)


def test_bootstrap_is_near_the_normal_interval_for_many_slides():
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_bootstrap_is_seeded_and_large_samples_use_bounded_memory():
    values = np.linspace(0, 1, 2500)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert BOOTSTRAP_RESAMPLES >= 1000


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_bootstrap_stays_within_the_data(values):
    low, high = bootstrap_interval(values)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
