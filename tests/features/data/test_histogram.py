"""Counts of levels against scipy and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from deltaclip.features.data.histogram import Histogram, counts, log_ratio, mean_of, mean_square_of, total


@pytest.fixture(params=[0, 1, 2])
def levels(request):
    generator = np.random.default_rng(request.param)
    return generator.binomial(255, generator.random(), size=(3, 17, 29)).astype(np.uint8)


def test_moments_and_entropy(levels):
    found, flat = Histogram.of(levels), levels.ravel().astype(float)
    assert found.mean() == pytest.approx(flat.mean())
    assert found.mean_square() == pytest.approx((flat**2).mean())
    assert found.spread() == pytest.approx(flat.std())
    assert [found.moment(order) for order in (2, 3, 4)] == pytest.approx(
        [scipy.stats.moment(flat, order) for order in (2, 3, 4)], rel=1e-9
    )
    assert found.entropy() == pytest.approx(scipy.stats.entropy(np.bincount(levels.ravel()), base=2))
    assert found.share(3, 90) == pytest.approx(((flat >= 3) & (flat <= 90)).mean())
    there = np.unique(levels)
    assert found.unused() == pytest.approx(1 - len(there) / (int(there[-1]) - int(there[0]) + 1))


def test_planes_count_together_and_slices_as_what_they_are(levels):
    np.testing.assert_array_equal(
        counts(levels[:, ::2, 1:-1]), np.bincount(levels[:, ::2, 1:-1].ravel(), minlength=256)
    )
    both = Histogram.of(levels, levels[:1])
    np.testing.assert_allclose(both.share_K, Histogram.of(np.concatenate([levels, levels[:1]])).share_K)


def test_quantiles_are_those_of_levels_spread_over_one(levels):
    spread = (levels.ravel()[:, None] + (np.arange(100) + 0.5) / 100 - 0.5).ravel()
    found = Histogram.of(levels)
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert found.quantile(share) == pytest.approx(np.quantile(spread, share), abs=0.02)
    rising = [found.quantile(share) for share in np.linspace(0, 1, 50)]
    assert rising == sorted(rising)


@pytest.mark.parametrize(("level", "expected"), [(0, 0.0), (7, 7.0), (255, 255.0)])
def test_the_median_of_one_level_is_that_level(level, expected):
    assert Histogram.of(np.full((2, 3), level, dtype=np.uint8)).quantile(0.5) == expected


def test_no_counts_at_all_are_level_0():
    nothing = Histogram(np.zeros(32))
    assert (nothing.mean(), nothing.spread(), nothing.entropy(), nothing.unused()) == (0, 0, 0, 0)


def test_sums_are_exact_of_integers_and_close_of_floats():
    generator = np.random.default_rng(0)
    steps = generator.integers(-1020, 1021, 100_003).astype(np.int16)
    assert total(steps) == steps.astype(int).sum()
    assert mean_square_of(steps.reshape(1, -1)) == (steps.astype(int) ** 2).sum() / steps.size
    values = generator.normal(5, 1, 300_001).astype(np.float32)
    assert mean_of(values) == pytest.approx(values.astype(float).mean(), rel=1e-6)  # float32 by pairs


def test_ratios_of_next_to_nothing_are_1():
    assert log_ratio(1e-9, 0, 0.1) == pytest.approx(0, abs=1e-7)
    assert log_ratio(20, 10, 1e-9) == pytest.approx(np.log(2))
