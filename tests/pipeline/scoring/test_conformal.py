"""Intervals: the curve of groups against its definition, coverage of fresh groups, sources told or guessed."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from deltaclip.pipeline.scoring.conformal import MAX_POINTS, _fit_sources, _ridge, fit_intervals, group_curve
from deltaclip.pipeline.scoring.groups import group_keys

LEVELS = (0.8, 0.9, 0.95)


def smallest_error(error_N, groups_N, coverage):
    """Return the quantile by its definition, one candidate after the other."""
    groups = np.unique(groups_N)
    for error in np.sort(error_N):
        mass = sum((error_N[groups_N == group] <= error).mean() for group in groups) / (len(groups) + 1)
        if mass >= coverage - 1e-12:
            return error
    return np.inf


@pytest.mark.parametrize("num_groups", [1, 2, 9, 10, 40])
def test_curve_is_the_quantile_over_groups_and_a_fresh_one(num_groups):
    rng = np.random.default_rng(num_groups)
    groups_N = np.repeat(np.arange(num_groups), rng.integers(1, 12, num_groups))
    error_N = np.round(rng.exponential(size=len(groups_N)), 1)  # with equal ones
    curve = group_curve(error_N, groups_N)
    for coverage in (0.01, 0.3, 0.5, 0.8, 0.9, 0.95, 0.999):
        assert curve.at(coverage) == smallest_error(error_N, groups_N, coverage)


def test_curve_of_many_rows_is_never_below_that_of_all():
    rng = np.random.default_rng(0)
    error_N, groups_N = rng.exponential(size=20_000), rng.integers(0, 3000, 20_000)
    curve = group_curve(error_N, groups_N)
    assert len(curve.error_Q) <= MAX_POINTS
    order, (_, code_N, size_G) = np.argsort(error_N), np.unique(groups_N, return_inverse=True, return_counts=True)
    mass_N = np.cumsum(1 / ((len(size_G) + 1) * size_G[code_N[order]]))
    for coverage in (*LEVELS, 0.5):
        exact = error_N[order][np.searchsorted(mass_N, coverage)]
        above = error_N[order][np.searchsorted(mass_N, coverage + 2 / MAX_POINTS)]
        assert exact <= curve.at(coverage) <= above


def test_ridge_leaves_groups_out_as_refits_do():
    rng = np.random.default_rng(1)
    x_MF, groups_M = rng.standard_normal((60, 3)), rng.integers(0, 9, 60)
    y_M = x_MF @ np.array([1.0, -2.0, 0.5]) + rng.standard_normal(60)
    weight_F, left_out_M = _ridge(x_MF, y_M, groups_M)
    best = min(10.0**k for k in range(-1, 5))
    errors = {}
    for strength in (10.0**k for k in range(-1, 5)):
        said = np.empty(60)
        for group in np.unique(groups_M):
            own = groups_M == group
            # The closed form centres on all rows, with the penalty on weights alone: the same model, refitted.
            model = Ridge(alpha=strength).fit(x_MF[~own], y_M[~own])
            said[own] = model.predict(x_MF[own])
        errors[strength] = ((said - y_M) ** 2).mean(), said
    best = min(errors, key=lambda strength: errors[strength][0])
    assert left_out_M == pytest.approx(errors[best][1], abs=1e-8)
    assert weight_F == pytest.approx(Ridge(alpha=best).fit(x_MF, y_M).coef_, abs=1e-8)


def test_sources_are_guessed_as_linear_discriminants_do():
    rng = np.random.default_rng(2)
    code_N = np.repeat([0, 1, 2], (500, 300, 200))
    x_NC = rng.standard_normal((1000, 4)) @ rng.standard_normal((4, 4)) + rng.standard_normal((3, 4))[code_N] * 2
    keys = group_keys(np.array(["a", "b", "c"]))
    ours = _fit_sources(x_NC, code_N, keys).guess(x_NC)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x_NC, code_N).predict_proba(x_NC)
    assert ours.sum(axis=1) == pytest.approx(np.ones(1000))
    # A tenth of the covariance is taken as diagonal.
    assert np.abs(ours - theirs).mean() < 0.02
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.97


def drawn(rng, num_groups, *, noise_K=(0.03, 0.1, 0.2), per_group=6):
    """Return scores, labels, groups, sources and what rows look like: errors share a part within a group."""
    groups_N = np.repeat(np.arange(num_groups), per_group)
    source_N = np.tile(np.arange(len(noise_K)), len(groups_N) // len(noise_K) + 1)[: len(groups_N)]
    score_N = rng.uniform(0.3, 0.7, len(groups_N))
    shared_N = rng.standard_normal(num_groups)[groups_N]
    error_N = (0.6 * shared_N + 0.8 * rng.standard_normal(len(groups_N))) * np.array(noise_K)[source_N]
    looks_NC = np.eye(len(noise_K))[source_N] * 4 + rng.standard_normal((len(groups_N), len(noise_K)))
    return score_N, score_N + error_N, groups_N, source_N.astype(np.uint64), looks_NC


@pytest.mark.slow
def test_fresh_groups_are_covered_as_asked_on_average_and_by_source():
    rng, inside = np.random.default_rng(3), {}
    for _ in range(60):
        score_N, label_N, groups_N, source_N, looks_NC = drawn(rng, 120)
        found = fit_intervals(score_N, label_N, groups_N, looks_NC, source_N=source_N)
        score_N, label_N, _, source_N, looks_NC = drawn(rng, 120)
        for kind, told in (("guessed", None), ("told", source_N)):
            for coverage in LEVELS:
                low, high = found.bounds(score_N, looks_NC, coverage=coverage, source_N=told)
                hit = (low <= label_N) & (label_N <= high)
                inside.setdefault((kind, coverage), []).append(
                    [hit.mean(), *(hit[source_N == k].mean() for k in range(3))]
                )
    for (kind, coverage), shares in inside.items():
        share, *by_source = np.mean(shares, axis=0)
        # 60 draws of 720 rows in 120 groups: the mean has an SE of about .002.
        assert share == pytest.approx(coverage, abs=0.02), (kind, coverage)
        # Guesses are not certain, and errors of one source in seven of the other's: most of it is made good.
        assert by_source == pytest.approx([coverage] * 3, abs=0.03 if kind == "told" else 0.07), (kind, coverage)


def test_without_sources_a_wide_one_is_covered_worse_so_guessing_is_of_use():
    rng = np.random.default_rng(4)
    score_N, label_N, groups_N, source_N, looks_NC = drawn(rng, 400)
    blind = fit_intervals(score_N, label_N, groups_N, looks_NC)
    seeing = fit_intervals(score_N, label_N, groups_N, looks_NC, source_N=source_N)
    wide = source_N == 2
    shares = []
    for found in (blind, seeing):
        low, high = found.bounds(score_N, looks_NC, coverage=0.9)
        shares.append(((low <= label_N) & (label_N <= high))[wide].mean())
    assert shares[0] < 0.8
    assert shares[1] > 0.83


@pytest.mark.parametrize(("num_groups", "is_whole"), [(1, True), (2, True), (8, True), (9, False), (30, False)])
def test_few_groups_give_all_of_the_range_rather_than_a_guess(num_groups, is_whole):
    rng = np.random.default_rng(5)
    score_N, label_N, groups_N, _, looks_NC = drawn(rng, num_groups)
    found = fit_intervals(score_N, label_N, groups_N, looks_NC)
    low, high = found.bounds(score_N, looks_NC, coverage=0.9)
    assert (found.most < 0.9) == is_whole
    assert bool(np.all(low == 0) and np.all(high == 1)) == is_whole


def test_ends_hold_the_score_and_stay_in_range():
    rng = np.random.default_rng(6)
    score_N, label_N, groups_N, source_N, looks_NC = drawn(rng, 50)
    found = fit_intervals(score_N, label_N, groups_N, looks_NC, source_N=source_N)
    score_N = np.concatenate([rng.uniform(0, 1, 298), [0, 1]]).astype(np.float32)
    last = (0.0, 1.0)
    for coverage in (0.01, 0.5, 0.9, 0.99):
        low, high = found.bounds(score_N, looks_NC, coverage=coverage)
        assert (low.dtype, high.dtype) == (np.float32, np.float32)
        assert np.all((low >= 0) & (low <= score_N) & (score_N <= high) & (high <= 1))
        assert last[1] - last[0] != (high - low).mean()
        last = (0.0, float((high - low).mean()))
    assert np.isnan(found.bounds(np.full(300, np.nan), looks_NC, coverage=0.9)[0]).all()


def test_wrong_by_nothing_and_rows_that_lack_something():
    rng = np.random.default_rng(7)
    score_N, _, groups_N, source_N, looks_NC = drawn(rng, 40)
    exact = fit_intervals(score_N, score_N, groups_N, looks_NC, source_N=source_N)
    low, high = exact.bounds(score_N, looks_NC, coverage=0.9)
    assert (high - low).max() < 1e-3
    assert fit_intervals(score_N, np.full(240, np.nan), groups_N, looks_NC) is None
    label_N = np.where(groups_N < 20, score_N, np.nan)
    assert fit_intervals(score_N, label_N, groups_N, looks_NC).num_groups == 20
    with pytest.raises(ValueError, match="coverage must lie between 0 and 1, not 1"):
        exact.bounds(score_N, looks_NC, coverage=1)
