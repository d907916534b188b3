"""Means over prompts against numpy, scipy and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import norm, t, ttest_1samp, ttest_rel

from deltaclip.pipeline.scoring import prompt_means
from deltaclip.pipeline.scoring.prompt_means import holm, ranked_means, unit_means


def test_a_unit_counts_once_however_many_rows_it_has():
    value, unit = np.array([1.0, 3.0, 5.0, np.nan, 7.0]), np.array([0, 0, 1, 1, 3])
    np.testing.assert_array_equal(unit_means(value, unit, 4), [2.0, 5.0, np.nan, 7.0])


@pytest.mark.parametrize("units", [5, 40, 300])
def test_intervals_and_p_values_are_those_of_students_t_where_values_are_normal(units):
    rng = np.random.default_rng(units)
    shared = rng.normal(0.5, 0.2, units)
    mean_UG = np.stack([shared + rng.normal(0.03, 0.05, units), shared + rng.normal(0, 0.05, units)], axis=1)
    means, found = ranked_means(mean_UG, resamples=20_000)
    own, pair = mean_UG[:, 0], found[0, 1]
    half = own.std(ddof=1) / math.sqrt(units) * t.ppf(0.975, units - 1)
    assert means[0].value == pytest.approx(own.mean(), abs=1e-12)
    # The bootstrap's own error at 20,000 draws, and that five values are not normal.
    assert (means[0].hi - means[0].lo) / (2 * half) == pytest.approx(1, abs=0.2 if units == 5 else 0.06)
    assert pair.is_paired
    assert pair.only == (0, 0)
    assert pair.mean.value == pytest.approx((mean_UG[:, 0] - mean_UG[:, 1]).mean(), abs=1e-12)
    expected = ttest_rel(mean_UG[:, 0], mean_UG[:, 1]).pvalue
    assert pair.mean.p_value == pytest.approx(max(expected, 1e-4), abs=0.03)
    assert (pair.mean.lo > 0 or pair.mean.hi < 0) == (pair.mean.p_value < 0.05)


def test_the_interval_is_the_expanded_percentiles_of_drawn_prompts():
    rng = np.random.default_rng(3)
    values = rng.gamma(1.0, 1.0, 30)
    drawn = np.array([values[rng.integers(30, size=30)].mean() for _ in range(20_000)])
    tail = norm.cdf(math.sqrt(30 / 29) * t.ppf(0.025, 29))
    (mean, _), _ = ranked_means(np.stack([values, values], axis=1), resamples=20_000)
    # Two bootstraps of 20,000 draws: a 2.5 % point is known within 3 % of the width.
    np.testing.assert_allclose([mean.lo, mean.hi], np.quantile(drawn, [tail, 1 - tail]), atol=0.03 * np.ptp(drawn))


def test_prompts_that_one_side_has_alone_are_left_out_of_a_difference():
    rng = np.random.default_rng(0)
    hard = np.r_[rng.uniform(0.6, 0.8, 20), rng.uniform(0.0, 0.2, 20)]  # b lacks the easy half, and is no worse
    a, b = hard.copy(), hard.copy()
    a[30:], b[:10] = np.nan, np.nan
    means, found = ranked_means(np.stack([a, b], axis=1), resamples=500)
    assert means[0].value - means[1].value > 0.1
    assert found[0, 1].mean.value == 0
    assert (found[0, 1].mean.units, found[0, 1].only, found[0, 1].is_paired) == (20, (10, 10), True)


def test_without_common_prompts_the_difference_is_that_of_independent_means():
    rng = np.random.default_rng(0)
    a, b = np.r_[rng.normal(0.5, 0.1, 60), np.full(90, np.nan)], np.r_[np.full(60, np.nan), rng.normal(0.4, 0.2, 90)]
    _, found = ranked_means(np.stack([a, b], axis=1))
    half = 1.96 * math.sqrt(np.nanvar(a, ddof=1) / 60 + np.nanvar(b, ddof=1) / 90)
    difference = found[0, 1]
    assert not difference.is_paired
    assert difference.mean.hi - difference.mean.lo == pytest.approx(2 * half, rel=0.08)


def test_one_prompt_has_a_mean_and_no_interval():
    (mean, _), found = ranked_means(np.array([[0.3, 0.4]]))
    assert (mean.value, mean.units) == (0.3, 1)
    assert math.isnan(mean.lo)
    assert math.isnan(found[0, 1].mean.p_value)
    assert mean.to_json()["lo"] is None


def test_very_many_prompts_take_the_normal_limit(monkeypatch):
    values = np.random.default_rng(0).uniform(0, 1, (500, 2))
    drawn, _ = ranked_means(values)
    monkeypatch.setattr(prompt_means, "MAX_UNITS", 499)
    limit, _ = ranked_means(values)
    assert limit[0].hi - limit[0].lo == pytest.approx(drawn[0].hi - drawn[0].lo, rel=0.05)


def test_the_same_seed_gives_the_same_result():
    values = np.random.default_rng(0).uniform(0, 1, (30, 3))
    assert ranked_means(values, seed=4) == ranked_means(values, seed=4)


def test_holm_is_the_closed_test_of_bonferroni():
    """Adjusted p of a hypothesis: the largest Bonferroni p of any set of hypotheses that it is in."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 5):
        p = rng.uniform(0, 0.2, count).tolist()
        sets = [each for size in range(1, count + 1) for each in itertools.combinations(range(count), size)]
        closed = [max(min(1, len(s) * min(p[i] for i in s)) for s in sets if place in s) for place in range(count)]
        np.testing.assert_allclose(holm(p), closed)
    assert holm([0.01, math.nan])[0] == 0.01


def test_intervals_of_few_prompts_cover():
    """20 skewed units: plain percentiles cover .92; the t-interval beside it is the yardstick."""
    rng, held, by_t = np.random.default_rng(1), 0, 0
    for seed in range(200):
        values = rng.beta(2, 4, 20)
        (mean, _), _ = ranked_means(np.stack([values, values], axis=1), resamples=400, seed=seed)
        held += mean.lo <= 1 / 3 <= mean.hi
        by_t += ttest_1samp(values, 1 / 3).pvalue > 0.05
    assert held / 200 == pytest.approx(0.95, abs=0.04)
    assert abs(held - by_t) < 10
