"""Intervals against a bootstrap that builds every resample, and their coverage on simulated data."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deltaclip.pipeline.scoring import intervals as bootstrap
from deltaclip.pipeline.scoring.agreement import srocc
from deltaclip.pipeline.scoring.intervals import (
    PairedDifference,
    Trial,
    judged_difference,
    paired_difference,
    srocc_interval,
)
from deltaclip.tests import reference


def draw(seed, num_rows, rho=0.7, levels=1000):
    rng = np.random.default_rng(seed)
    label = rng.normal(size=num_rows)
    predicted = rho * label + math.sqrt(1 - rho**2) * rng.normal(size=num_rows)
    return np.round(predicted * levels) / levels, np.round(label * levels) / levels


@pytest.mark.parametrize("levels", [2, 1000])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_resample_is_exactly_the_correlation_of_its_rows(levels, grouped):
    """The draws are recovered from the same generator, and each resample is built and ranked from scratch."""
    x, y = draw(1, 41, levels=levels)
    unit = np.arange(41) // 4 if grouped else np.arange(41)
    num_units = unit.max() + 1
    (found,) = bootstrap._draw([x], y, unit, resamples=50, rng=np.random.default_rng(9))
    drawn = np.random.default_rng(9).integers(num_units, size=(50, num_units))
    for value, units in zip(found, drawn, strict=True):
        rows = np.concatenate([np.flatnonzero(unit == one) for one in units])
        assert value == pytest.approx(reference.spearman(x[rows], y[rows]), abs=1e-12)


def test_blocks_do_not_change_the_draws(monkeypatch):
    x, y = draw(2, 100)
    whole = srocc_interval(x, y, resamples=101, seed=3)
    monkeypatch.setattr(bootstrap, "BLOCK", 1700)  # 17 resamples at a time, the last block short
    assert srocc_interval(x, y, resamples=101, seed=3) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("grouped", [False, True])
def test_percentiles_match_a_slow_bootstrap(grouped):
    x, y = draw(4, 60, levels=3)
    groups = [f"prompt {row // 3 if grouped else row}" for row in range(60)]
    slow = reference.bootstrap_spearman(x, y, groups=groups, resamples=600, rng=np.random.default_rng(0))
    lo, hi = srocc_interval(x, y, seed=5, resamples=4000, groups=groups if grouped else None)
    # The error of a 2.5 % quantile of 600 draws is about sqrt(.025 * .975 / 600) / density = 0.11 SD.
    tolerance = 0.4 * np.std(slow)
    assert [lo, hi] == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=tolerance)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    # SROCC of normal variables with correlation rho is 6/pi asin(rho/2) (Pearson 1907).
    truth = 6 / math.pi * math.asin(0.7 / 2)
    covered = 0
    for seed in range(200):
        lo, hi = srocc_interval(*draw(seed, 150), seed=seed, resamples=200)
        covered += lo <= truth <= hi
    # 95 % of 200 with an SD of 3; the percentile bootstrap with 200 resamples is a little short of it.
    assert 178 <= covered <= 199


def test_whole_groups_make_the_wider_interval_where_rows_depend_on_each_other():
    rng = np.random.default_rng(0)
    prompt = np.arange(400) // 10
    label = rng.normal(size=40)[prompt] + 0.2 * rng.normal(size=400)
    predicted = label + rng.normal(size=40)[prompt] + 0.2 * rng.normal(size=400)
    by_row = np.ptp(srocc_interval(predicted, label, seed=1))
    by_prompt = np.ptp(srocc_interval(predicted, label, seed=1, groups=prompt))
    # Ten copies of a prompt count as ten rows: sqrt(10) too narrow, less the small row noise.
    assert 2 < by_prompt / by_row < 4


def test_levels_are_nested_and_the_seed_decides():
    x, y = draw(6, 80)
    wide, narrow = srocc_interval(x, y, seed=1, level=0.99), srocc_interval(x, y, seed=1, level=0.5)
    assert wide[0] < narrow[0] < srocc(x, y) < narrow[1] < wide[1]
    assert srocc_interval(x, y, seed=1) == srocc_interval(x, y, seed=1) != srocc_interval(x, y, seed=2)


def test_many_rows_are_resampled_in_part_with_the_spread_of_all(monkeypatch):
    x, y = draw(7, 4000)
    prompt = np.arange(4000) // 2
    whole = [srocc_interval(x, y, seed=1), srocc_interval(x, y, seed=1, groups=prompt)]
    monkeypatch.setattr(bootstrap, "MAX_ROWS", 1000)
    part = [srocc_interval(x, y, seed=1), srocc_interval(x, y, seed=1, groups=prompt)]
    for exact, found in zip(whole, part, strict=True):
        assert np.ptp(found) == pytest.approx(np.ptp(exact), rel=0.2)  # without the factor it is twice as wide
        assert found[0] < srocc(x, y) < found[1]


def test_at_the_cap_all_rows_are_used(monkeypatch):
    x, y = draw(8, 300)
    whole = srocc_interval(x, y, seed=1)
    monkeypatch.setattr(bootstrap, "MAX_ROWS", 300)
    assert srocc_interval(x, y, seed=1) == whole
    monkeypatch.setattr(bootstrap, "MAX_ROWS", 299)
    monkeypatch.setattr(bootstrap, "MIN_GROUPS", 20)
    assert srocc_interval(x, y, seed=1) != whole


def test_few_large_groups_are_all_kept_and_thinned(monkeypatch):
    monkeypatch.setattr(bootstrap, "MAX_ROWS", 100)
    unit = np.arange(4000) % 5
    rows, scale = bootstrap._part(unit, np.random.default_rng(0))
    assert (rows.size, scale, set(unit[rows])) == (100, 1.0, {0, 1, 2, 3, 4})
    x, y = draw(9, 4000)
    lo, hi = srocc_interval(x, y, seed=1, groups=unit)
    assert lo < srocc(x, y) < hi


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_too_few_rows_have_no_interval(num_rows):
    assert np.isnan(srocc_interval(np.arange(num_rows), np.arange(num_rows), seed=1)).all()


def test_three_rows_constants_and_a_single_group():
    lo, hi = srocc_interval([1, 2, 3], [1, 2, 3], seed=1)
    assert lo == hi == pytest.approx(1)  # resamples of one value have no SROCC and are left out
    assert np.isnan(srocc_interval([1, 1, 1], [1, 2, 3], seed=1)).all()
    assert np.isnan(srocc_interval([1, 2, 3], [1, 2, 3], seed=1, groups=["a", "a", "a"])).all()
    with pytest.raises(ValueError, match=r"^0 resamples, at least 1 is needed$"):
        srocc_interval([1, 2, 3], [1, 2, 3], seed=1, resamples=0)


def test_rows_without_labels_do_not_matter():
    x, y = draw(10, 90)
    groups = np.arange(90) // 5
    gaps = np.arange(90) % 4 == 0
    y_gaps, x_gaps = np.where(gaps, np.nan, y), np.where(gaps, np.nan, x)
    for given in (None, groups):
        kept = None if given is None else given[~gaps]
        expected = srocc_interval(x[~gaps], y[~gaps], seed=1, groups=kept)
        assert srocc_interval(x_gaps, y_gaps, seed=1, groups=given) == expected


def test_a_better_prediction_is_found_better_and_the_sign_is_a_minus_b():
    x, y = draw(11, 400, rho=0.9)
    worse = x + np.random.default_rng(1).normal(size=400)
    found, swapped = paired_difference(x, worse, y, seed=1), paired_difference(worse, x, y, seed=1)
    assert found.difference == pytest.approx(srocc(x, y) - srocc(worse, y))
    assert 0 < found.lo < found.difference < found.hi
    assert found.p_value == pytest.approx(2 / 1001)
    assert [-swapped.hi, -swapped.lo] == pytest.approx([found.lo, found.hi])
    assert set(found.to_json()) == {"difference", "lo", "hi", "p_value"}


@pytest.mark.parametrize("resamples", [39, 40, 199])
def test_an_interval_leaves_out_0_where_the_p_value_is_below_its_level(resamples):
    """Differences near the edge, where an interval between two draws and a count of draws would disagree."""
    verdicts = set()
    for seed in range(150):
        _, label = draw(seed, 60)
        noise = np.random.default_rng(1000 + seed).normal(size=(2, 60))
        found = paired_difference(label + noise[0], label + 1.25 * noise[1], label, resamples=resamples, seed=seed)
        verdicts.add(found.p_value <= 0.05)
        assert (found.p_value <= 0.05) == (found.lo > 0 or found.hi < 0)
    assert verdicts == {True, False}


def test_trials_on_the_same_rows_are_one_difference_with_one_interval():
    label = draw(1, 80)[1]
    noise = np.random.default_rng(0).normal(size=(6, 80))
    trials = [Trial(label + noise[at], label + 1.5 * noise[at + 3], label, np.arange(80), 100) for at in range(3)]
    values, judged = judged_difference(trials, over="rows")
    assert judged.difference == pytest.approx(np.mean(values))
    alone = [judged_difference([one], over="rows")[1] for one in trials]
    assert [alone[0].difference, alone[0].lo] != [judged.difference, judged.lo]
    assert judged.hi - judged.lo < np.mean([one.hi - one.lo for one in alone])


def test_equal_predictions_differ_by_nothing():
    x, y = draw(12, 50)
    assert paired_difference(x, 2 * x + 1, y, seed=1) == PairedDifference(difference=0, lo=0, hi=0, p_value=1)


def test_p_values_are_about_uniform_when_both_are_equally_good():
    rng = np.random.default_rng(3)
    values = []
    for seed in range(200):
        y = rng.normal(size=80)
        a, b = y + rng.normal(size=80), y + rng.normal(size=80)
        values.append(paired_difference(a, b, y, seed=seed, resamples=100).p_value)
    # 5 % of 200 is 10 with an SD of 3.1; half of 200 is 100 with an SD of 7.
    assert 2 <= sum(p < 0.05 for p in values) <= 22
    assert 75 <= sum(p < 0.5 for p in values) <= 125


def test_a_constant_prediction_has_no_difference():
    found = paired_difference([1, 1, 1, 1], [1, 2, 3, 4], [1, 2, 3, 5], seed=1).to_json()
    assert found == dict.fromkeys(("difference", "lo", "hi", "p_value"))
