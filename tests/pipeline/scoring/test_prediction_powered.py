"""Prediction-powered means against the formulas of the papers in float64, brute force, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm, t

from deltaclip.pipeline.scoring.prediction_powered import MIN_UNITS, ODD, Rated, human_difference, human_mean


def drawn(rng, *, units=100, rows=1, labelled=30, slope=0.8, noise=0.1, bias=0.0):
    """Rows of prompts with a level of their own; scores follow labels by a slope, with a bias."""
    unit = np.repeat(np.arange(units), rows)
    label = 0.5 + rng.normal(0, 0.15, units)[unit] + rng.normal(0, 0.05, len(unit))
    score = 0.5 + bias + slope * (label - 0.5) + rng.normal(0, noise, len(unit))
    shown = np.full(len(unit), np.nan)
    own = rng.choice(len(unit), labelled, replace=False)
    shown[own] = label[own]
    return Rated(score, shown, unit)


def test_of_single_rows_it_is_ppi_plus_plus():
    """Angelopoulos, Duchi and Zrnic 2023, mean estimation: lambda, estimate and variance as they write them."""
    rows = drawn(np.random.default_rng(0), units=3000, labelled=300)
    rated = np.isfinite(rows.label_N)
    y, f, f_rest = rows.label_N[rated], rows.score_N[rated], rows.score_N[~rated]
    n, N = len(y), len(f_rest)
    power = np.cov(y, f)[0, 1] / ((1 + n / N) * rows.score_N.var(ddof=1))
    value = power * f_rest.mean() + (y - power * f).mean()
    half = norm.ppf(0.975) * math.sqrt(power**2 * f_rest.var() / N + (y - power * f).var() / n)
    found = human_mean(rows, 3000)
    # Theirs takes the variance of scores from all rows, ours what is least in these; and t for 298 degrees.
    assert found.power[0] == pytest.approx(power * (n + N) / N, rel=0.1)
    assert found.value == pytest.approx(value, abs=0.05 * half)
    assert found.hi - found.value == pytest.approx(half, rel=0.02)
    assert found.alone == pytest.approx(y.mean(), abs=1e-12)
    alone = t.ppf(0.975, n - 1) * y.std(ddof=1) / math.sqrt(n)
    assert found.alone_hi - found.alone == pytest.approx(alone, rel=1e-9)
    assert found.saved == pytest.approx(n * ((alone / (found.hi - found.value)) ** 2 - 1), rel=1e-9)


def test_lambda_and_variance_are_those_of_brute_force_over_prompts():
    rows = drawn(np.random.default_rng(1), units=40, rows=3, labelled=50)
    rated = [math.isfinite(y) for y in rows.label_N]
    weight = [1 / 3] * len(rated)

    def spread(power):
        shown = sum(w for w, r in zip(weight, rated, strict=True) if r)
        mean = sum(w * f for w, f in zip(weight, rows.score_N, strict=True)) / sum(weight)
        rest = [y - power * f if r else 0.0 for y, f, r in zip(rows.label_N, rows.score_N, rated, strict=True)]
        centre = sum(w * e for w, e in zip(weight, rest, strict=True)) / shown
        total = 0.0
        for unit in range(40):
            own = [place for place in range(len(rated)) if rows.unit_N[place] == unit]
            part = sum(power * weight[p] * (rows.score_N[p] - mean) for p in own) / sum(weight)
            total += (part + sum(weight[p] * (rest[p] - centre) for p in own if rated[p]) / shown) ** 2
        return total, power * mean + centre

    grid = np.linspace(0, 1, 101)
    best = grid[np.argmin([spread(power)[0] for power in grid])]
    found = human_mean(rows, 40)
    assert found.power[0] == pytest.approx(best, abs=0.011)
    total, value = spread(found.power[0])
    u = found.units
    assert found.value == pytest.approx(value, abs=1e-12)
    assert found.hi - found.value == pytest.approx(math.sqrt(total * u / (u - 2)) * t.ppf(0.975, u - 2), rel=1e-9)


@pytest.mark.parametrize("slope", [0.8, 0.0, -0.8], ids=["good", "useless", "upside down"])
def test_it_holds_whatever_the_scorer(slope):
    """The superpopulation's mean is .5; three rows a prompt, 25 labels: small enough for t to matter."""
    rng, held, width = np.random.default_rng(2), [], []
    for _ in range(200):
        found = human_mean(drawn(rng, units=60, rows=3, labelled=25, slope=slope, noise=0.05, bias=0.3), 60)
        held.append(found.lo <= 0.5 <= found.hi)
        width.append((found.hi - found.lo) / (found.alone_hi - found.alone_lo))
    assert np.mean(held) == pytest.approx(0.95, abs=0.04)  # 2.6 standard errors of 200 draws
    assert np.mean(width) < 0.85 if slope > 0 else 0.97 < np.mean(width) < 1.06


def test_a_difference_holds_whether_the_same_prompts_are_rated_or_others():
    rng, held, narrower = np.random.default_rng(3), [], []
    for place in range(200):
        level = rng.normal(0, 0.2, 80)
        a, b = (drawn(rng, units=80, labelled=40) for _ in range(2))
        shown = np.isfinite(a.label_N) if place % 2 else np.isfinite(b.label_N)
        unit = np.arange(80)
        label = 0.5 + level + rng.normal(0, 0.05, 80)
        a = Rated(label + rng.normal(0, 0.05, 80), np.where(np.isfinite(a.label_N), label, np.nan), unit)
        label = 0.4 + level + rng.normal(0, 0.05, 80)
        b = Rated(0.2 + label + rng.normal(0, 0.05, 80), np.where(shown, label, np.nan), unit)
        found = human_difference(a, b, 80)
        held.append(found.lo <= 0.1 <= found.hi)
        narrower.append((found.hi - found.lo) / (found.alone_hi - found.alone_lo))
    assert np.mean(held) == pytest.approx(0.95, abs=0.04)
    assert np.mean(narrower[::2]) < 0.7


def test_a_difference_is_over_the_prompts_that_both_have():
    rng = np.random.default_rng(0)
    label = rng.uniform(0.4, 0.6, 60)
    a = Rated(label, label, np.arange(60))
    b = Rated(np.r_[label[20:], np.ones(20)], np.r_[label[20:], np.ones(20)], np.arange(20, 80))
    found = human_difference(a, b, 80)
    assert (found.value, found.units, found.labels) == (pytest.approx(0, abs=1e-12), 40, 80)


def test_with_every_row_rated_nothing_is_to_be_saved():
    rows = drawn(np.random.default_rng(0), units=50, labelled=50)
    found = human_mean(rows, 50)
    assert (found.value, found.lo, found.hi) == (found.alone, found.alone_lo, found.alone_hi)
    assert (found.power, found.saved, found.oddness) == ((0.0,), 0.0, 0.0)


@pytest.mark.parametrize("labelled", [0, MIN_UNITS - 1, MIN_UNITS])
def test_few_labels_are_no_mean(labelled):
    rows = drawn(np.random.default_rng(0), labelled=labelled)
    assert (human_mean(rows, 100) is None) == (labelled < MIN_UNITS)


def test_rows_that_were_not_chosen_at_random_are_noticed():
    rows = drawn(np.random.default_rng(0), units=200, labelled=200)
    best = np.where(rows.score_N > np.quantile(rows.score_N, 0.8), rows.label_N, np.nan)
    assert human_mean(rows._replace(label_N=best), 200).oddness > ODD
    chance = np.where(np.arange(200) % 5 == 0, rows.label_N, np.nan)
    assert human_mean(rows._replace(label_N=chance), 200).oddness < ODD
