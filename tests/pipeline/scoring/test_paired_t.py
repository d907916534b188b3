"""The t-interval of paired differences, judged by scipy and by the published correction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from deltaclip.pipeline.scoring.intervals import difference_over_splits, mean_difference

DIFFERENCES = [0.01, 0.03, -0.005, 0.02, 0.012]


def test_independent_repeats_are_scipys_t_test():
    found = mean_difference(DIFFERENCES)
    judge = stats.ttest_1samp(DIFFERENCES, 0)
    assert found.mean == pytest.approx(np.mean(DIFFERENCES))
    assert found.sd == pytest.approx(np.std(DIFFERENCES, ddof=1))
    assert found.p_value == pytest.approx(judge.pvalue)
    assert (found.lo, found.hi) == pytest.approx(tuple(judge.confidence_interval(0.95)))


def test_shared_training_rows_widen_the_interval_as_published():
    """Nadeau and Bengio 2003: t = mean / sqrt((1/K + n_test/n_train) SD^2)."""
    found = mean_difference(DIFFERENCES, test_to_train=0.25)
    t = np.mean(DIFFERENCES) / math.sqrt((1 / 5 + 0.25) * np.var(DIFFERENCES, ddof=1))
    assert found.p_value == pytest.approx(2 * stats.t.sf(t, 4))
    plain = mean_difference(DIFFERENCES)
    assert (found.hi - found.lo) / (plain.hi - plain.lo) == pytest.approx(math.sqrt(1 + 5 * 0.25))


def test_the_correction_keeps_its_level_where_splits_overlap():
    """Repeats that share a part of their error: the plain interval misses the truth far too often."""
    rng = np.random.default_rng(0)
    missed = {0.0: 0, 0.25: 0}
    for _ in range(1000):
        # Correlation n_test / (n_test + n_train) between repeats is what the correction assumes.
        shared, own = rng.normal(scale=math.sqrt(0.2)), rng.normal(scale=math.sqrt(0.8), size=10)
        for ratio in missed:
            found = mean_difference(shared + own, test_to_train=ratio)
            missed[ratio] += not found.lo <= 0 <= found.hi
    # 5 % of 1,000, with a standard deviation of 7.
    assert 25 < missed[0.25] < 75
    assert missed[0.0] > 150


def test_what_cannot_be_judged_is_none():
    assert mean_difference([]).to_json() == dict.fromkeys(("mean", "sd", "lo", "hi", "p_value"))
    one = mean_difference([0.1, math.nan]).to_json()
    assert one == {"mean": 0.1, "sd": None, "lo": None, "hi": None, "p_value": None}
    assert mean_difference([0.0, 0.0]).p_value == 1
    assert mean_difference([0.5, 0.5]).p_value == 0


def test_splits_are_judged_by_the_ratio_of_their_mean_sizes():
    found = difference_over_splits(DIFFERENCES, num_test_K=[40, 50, 60, 50, 50], num_train_K=[190, 200, 210, 200, 200])
    assert found == mean_difference(DIFFERENCES, test_to_train=0.25)
