"""Distributions of normalised luma against scipy in float64, and against samples of known distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
from scipy.optimize import brentq

from deltaclip.features.data.natural_scene import (
    NAMES,
    NEIGHBOURS,
    TAPS,
    Sides,
    asymmetric_gaussian,
    gaussian,
    normalised,
    scene_of,
    shape_of,
    side_sums,
)

WINDOW = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256


def random_tiles(tiles=5, height=40, width=48, seed=0):
    generator = np.random.default_rng(seed)
    smooth = scipy.ndimage.gaussian_filter(generator.normal(0, 300, (tiles, height, width)), (0, 3, 3))
    return np.clip(128 + smooth + generator.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


def slow_normalised(tile):
    level = tile.astype(float)
    mean = scipy.ndimage.correlate(level, WINDOW)[2:-2, 2:-2]
    variance = scipy.ndimage.correlate(level**2, WINDOW)[2:-2, 2:-2] - mean**2
    sd = np.sqrt(np.maximum(variance, 0))
    return (level[2:-2, 2:-2] - mean) / (sd + 1), sd


def sums_of(values):
    """What `side_sums` gives, of any values, in float64."""
    values = np.asarray(values, dtype=np.float64).ravel()
    left, right = values[values < 0], values[values > 0]
    return np.array([np.abs(values).sum(), (left**2).sum(), left.size, (right**2).sum(), right.size, values.size])


def products(values, step):
    """Products of each value with its neighbour, `values` (T, H, W)."""
    (down, across), (height, width) = step, values.shape[1:]
    here = values[:, : height - down, max(0, -across) : width - max(0, across)]
    return here * values[:, down:, max(0, across) : width + min(0, across)]


@pytest.mark.parametrize("tiles", [random_tiles(), np.zeros((1, 8, 8), np.uint8), np.full((2, 9, 8), 255, np.uint8)])
def test_normalised_luma(tiles):
    values, sds = normalised(tiles)
    assert values.shape == sds.shape == tiles.shape
    for plane in (values, sds):
        assert not plane[:, -TAPS:].any()
        assert not plane[:, :, -TAPS:].any()
    for tile, value, sd in zip(tiles, values[:, :-TAPS, :-TAPS], sds[:, :-TAPS, :-TAPS], strict=True):
        expected_value, expected_sd = slow_normalised(tile)
        # float32 after exact integers: seven digits; the reference loses some in mean square less square of the mean
        np.testing.assert_allclose(value, expected_value, atol=2e-6)
        np.testing.assert_allclose(sd, expected_sd, atol=2e-6)


def test_the_largest_sums_fit_their_integers():
    checkers = (np.indices((9, 9)).sum(axis=0) % 2 * 255).astype(np.uint8)
    _, expected = slow_normalised(checkers)
    np.testing.assert_allclose(normalised(checkers[None]).sd_THW[0, :-TAPS, :-TAPS], expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [0.15, 0.3, 0.7, 1, 1.5, 2, 3.7, 9.5])
def test_the_exponent_is_found_from_its_ratio(shape):
    def ratio(exponent):
        return scipy.special.gamma(2 / exponent) ** 2 / (
            scipy.special.gamma(1 / exponent) * scipy.special.gamma(3 / exponent)
        )

    assert shape_of(ratio(shape)) == pytest.approx(shape, rel=1e-5)  # a table of 2,000 steps
    assert brentq(lambda exponent: ratio(exponent) - ratio(shape), 0.12, 10) == pytest.approx(shape, rel=1e-9)
    assert (shape_of(1e-9), shape_of(1.0)) == pytest.approx((0.1, 10.0))


@pytest.mark.parametrize("shape", [0.7, 1, 2, 4])
def test_a_generalised_gaussian_is_recovered(shape):
    values = scipy.stats.gennorm(shape, scale=0.6).rvs(200_000, random_state=1).astype(np.float32)
    log_shape, log_sd = gaussian(sums_of(values))
    assert math.exp(log_shape) == pytest.approx(shape, rel=0.03)  # of 200,000 draws
    assert math.exp(log_sd) == pytest.approx(scipy.stats.gennorm(shape, scale=0.6).std(), rel=0.01)


@pytest.mark.parametrize(("shape", "left", "right"), [(0.8, 0.3, 0.9), (2, 1.0, 0.5), (1.3, 0.7, 0.7)])
def test_an_asymmetric_gaussian_is_recovered(shape, left, right):
    # Density with scales a, b left and right of 0: the sides are drawn with shares a / (a + b) and b / (a + b).
    generator = np.random.default_rng(2)
    size = np.abs(scipy.stats.gennorm(shape).rvs(400_000, random_state=3))
    values = np.where(generator.random(size.size) < left / (left + right), -left * size, right * size)
    log_shape, mean, log_left, log_right = asymmetric_gaussian(sums_of(values))
    sd = scipy.stats.gennorm(shape).std()
    assert math.exp(log_shape) == pytest.approx(shape, rel=0.03)
    assert (math.exp(log_left), math.exp(log_right)) == pytest.approx((left * sd, right * sd), rel=0.02)
    assert mean == pytest.approx(values.mean(), abs=0.02)


@pytest.mark.parametrize("values", [[0.0], [1.0, 2.0], [-3.0], [0.0] * 9, [1e-8, -1e-8], [1e6, -1.0]])
def test_one_sided_and_degenerate_values(values):
    found = asymmetric_gaussian(sums_of(values))
    assert np.isfinite(found).all()
    if min(values) >= 0:
        assert found[2] == pytest.approx(math.log(1e-3))  # nothing is left of 0


FLAT = np.where(np.arange(48) < 20, 255, random_tiles(tiles=2))  # half of it one colour: values that are 0


@pytest.mark.parametrize("tiles", [random_tiles(), FLAT.astype(np.uint8), np.zeros((2, 9, 8), np.uint8)])
@pytest.mark.parametrize("step", [None, *NEIGHBOURS.values()])
def test_sums_over_pairs_of_neighbours(tiles, step):
    values = normalised(tiles).value_THW
    inner = values[:, :-TAPS, :-TAPS].astype(np.float64)
    found = side_sums(Sides.of(values), step)
    # Rows are summed in float32: seven digits.
    np.testing.assert_allclose(found, sums_of(inner if step is None else products(inner, step)), rtol=1e-5)


def test_a_side_without_members_is_0():
    values = np.zeros((1, 9, 9), np.float32)
    values[0, :5, :5] = np.random.default_rng(0).random((5, 5), np.float32)
    assert side_sums(Sides.of(values))[1:3] == side_sums(Sides.of(values), (1, -1))[1:3] == [0, 0]


def slow_numbers(tiles):
    """The numbers of one scale in float64, by sums over all tiles at once."""
    values, sds = (np.stack(parts) for parts in zip(*map(slow_normalised, tiles), strict=True))
    found = [np.log(sds.std() + 0.1) - np.log(sds.mean() + 0.1)]

    def exponent(ratio):
        return math.log(shape_of(ratio))

    found += [exponent(np.abs(values).mean() ** 2 / (values**2).mean()), np.log(np.sqrt((values**2).mean()))]
    for step in NEIGHBOURS.values():
        product = products(values, step)
        left, right = (np.sqrt((side**2).mean()) for side in (product[product < 0], product[product > 0]))
        ratio = left / right
        adjusted = np.abs(product).mean() ** 2 / (product**2).mean() * (ratio**3 + 1) * (ratio + 1)
        shape = shape_of(adjusted / (ratio**2 + 1) ** 2)
        gamma = scipy.special.gamma
        width = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
        found += [
            np.log(shape),
            (right - left) * width * gamma(2 / shape) / gamma(1 / shape),
            np.log(left),
            np.log(right),
        ]
    return found


def test_all_numbers_against_float64():
    full = random_tiles(seed=5)
    half = random_tiles(height=20, width=24, seed=6)
    found = scene_of([full, half])
    assert tuple(found) == NAMES
    for scale, tiles in ((1, full), (2, half)):
        names = [name for name in NAMES if name.endswith(f"_{scale}") and not name.startswith("local_p")]
        # 1e-6 is added to squares, so that a constant picture has logarithms
        np.testing.assert_allclose([found[name] for name in names], slow_numbers(tiles), atol=1e-4)
        sds = np.stack([slow_normalised(tile)[1] for tile in tiles])
        for share in (10, 50, 90):
            level = np.exp(found[f"local_p{share}_{scale}"]) - 0.1
            assert level == pytest.approx(np.percentile(sds, share), rel=0.02)  # of 256 levels of the root
