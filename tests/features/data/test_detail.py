"""Sharpness, noise, blocks and the spectrum against slow formulas in float64, and on pictures of known answers."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage

from deltaclip.features.data.detail import NAMES, PATCH, blockiness, detail_of, noise, spectrum

LAPLACE = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
IMMERKAER = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])


def random_tiles(side=64, tiles=2, seed=0):
    generator = np.random.default_rng(seed)
    smooth = scipy.ndimage.gaussian_filter(generator.normal(0, 200, (tiles, side, side)), (0, 2, 2))
    return np.clip(120 + smooth + generator.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def scales():
    return [random_tiles(64 // scale, seed=scale) for scale in (1, 2, 4, 8)]


@pytest.fixture(scope="module")
def found(scales):
    return detail_of(scales, random_tiles(seed=7), random_tiles(seed=8))


def inner(tile, kernel):
    return scipy.ndimage.correlate(tile.astype(float), kernel)[1:-1, 1:-1].ravel()


def steps(tiles):
    return [np.abs(np.diff(tiles.astype(float), axis=axis)).ravel() for axis in (2, 1)]


def test_names_and_numbers_belong_together(found):
    assert tuple(found) == NAMES
    assert np.isfinite(list(found.values())).all()


@pytest.mark.parametrize("place", range(4))
def test_gradients(scales, found, place):
    across, down = steps(scales[place])
    both, scale = np.concatenate([across, down]), 2**place
    # Shares are of each direction, which have equally many pairs in square tiles.
    assert found[f"gradient_mean_{scale}"] == pytest.approx(np.log(both.mean() + 0.1))
    assert found[f"gradient_flat_{scale}"] == pytest.approx((both <= 1).mean())
    assert found[f"gradient_direction_{scale}"] == pytest.approx(np.log((across.mean() + 0.1) / (down.mean() + 0.1)))
    sparsity = np.log(((both**2).mean() + 0.01) / (both.mean() ** 2 + 0.01)) / 2
    assert found[f"gradient_sparsity_{scale}"] == pytest.approx(sparsity)
    assert np.exp(found[f"gradient_p99_{scale}"]) - 1 == pytest.approx(np.percentile(both, 99), abs=1.5)


@pytest.mark.parametrize("place", range(3))
def test_laplacian_and_noise(scales, found, place):
    scale = 2**place
    laplace = np.concatenate([inner(tile, LAPLACE) for tile in scales[place]])
    assert found[f"laplacian_{scale}"] == pytest.approx(np.log(laplace.std() + 0.1))
    answer = np.concatenate([inner(tile, IMMERKAER) for tile in scales[place]])
    expected = np.log(np.sqrt(np.pi / 2) / 6 * np.abs(answer).mean() + 0.1)
    assert found[f"noise_{scale}"] == pytest.approx(expected)


@pytest.mark.parametrize("place", range(3))
def test_reblur(scales, found, place):
    shares = []
    for axis in (2, 1):
        level = np.moveaxis(scales[place].astype(float), axis, 2)
        blurred = scipy.ndimage.uniform_filter1d(level, 9, axis=2)
        sharp, soft = (np.abs(np.diff(plane, axis=2))[:, :, 4:-4] for plane in (level, blurred))
        shares.append(1 - np.maximum(0, sharp - soft).sum() / sharp.sum())
    assert found[f"reblur_{2**place}"] == pytest.approx(max(shares), abs=1e-3)  # a tenth of a ninth is added to the sum


def test_chroma(found):
    for plane, seed in (("blue", 7), ("red", 8)):
        tiles = random_tiles(seed=seed)
        assert found[f"chroma_{plane}_gradient"] == pytest.approx(np.log(np.concatenate(steps(tiles)).mean() + 0.1))
        assert found[f"chroma_{plane}_noise"] == noise(tiles)


@pytest.mark.parametrize("sd", [1, 3, 10, 25])
def test_noise_of_known_size_is_found(sd):
    generator = np.random.default_rng(sd)
    ramp = np.linspace(80, 170, 128)[None, :, None] + np.linspace(-20, 20, 128)
    noisy = (ramp + generator.normal(0, sd, (4, 128, 128))).round().clip(0, 255).astype(np.uint8)
    # rounding to levels adds 1/12 to the variance; 65,000 pixels
    assert np.exp(noise(noisy)) - 0.1 == pytest.approx(np.hypot(sd, 12**-0.5), rel=0.03)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("shift", range(8))
def test_blockiness_by_its_sums(axis, shift):
    tiles = random_tiles(seed=shift)
    blocks = np.random.default_rng(shift).integers(0, 60, (2, 9, 9)).repeat(8, axis=1).repeat(8, axis=2)
    tiles = (tiles // 2 + blocks[:, shift : shift + 64, shift : shift + 64]).astype(np.uint8)
    step = np.abs(np.diff(tiles.astype(float), axis=axis))
    by_place = [np.take(step, range(place, 63, 8), axis=axis).mean() for place in range(8)]
    expected = (
        np.log((by_place[7] + 0.1) / (np.mean(by_place[:7]) + 0.1)),
        np.log((max(by_place) + 0.1) / (np.mean(by_place) + 0.1)),
    )
    assert blockiness(step.astype(np.uint8), axis) == pytest.approx(expected)
    assert np.argmax(by_place) == (7 - shift) % 8


def test_crossings(scales, found):
    for axis, way in ((2, "across"), (1, "down")):
        slope = np.diff(scales[0].astype(int), axis=axis)
        first, second = (np.take(slope, range(start, 62 + start), axis=axis) for start in (0, 1))
        assert found[f"block_crossings_{way}"] == pytest.approx((first * second < 0).mean())


def slow_power(tile):
    window = np.sin(np.pi * (np.arange(PATCH) + 0.5) / PATCH) ** 2
    patch = tile.astype(float) - tile.mean()
    return np.abs(np.fft.fft2(patch * np.outer(window, window))) ** 2


def test_spectrum_against_the_whole_transform():
    tiles = random_tiles(seed=9)
    power = np.mean([slow_power(tile) for tile in tiles], axis=0)
    down, across = np.abs(np.meshgrid(*[np.fft.fftfreq(PATCH, 1 / PATCH)] * 2, indexing="ij"))
    far = np.hypot(down, across)
    radii = np.arange(2, 29)
    log_power = [np.log(power[far.round() == radius].mean()) for radius in radii]
    slope, curvature, high, direction, diagonal, nyquist = spectrum(tiles)
    # The floor of a tenth of a level is added to the power, and float32 squares: 1e-3.
    assert slope == pytest.approx(np.polyfit(np.log(radii), log_power, 1)[0], abs=1e-3)
    assert curvature == pytest.approx(np.polyfit(np.log(radii), log_power, 2)[0], abs=1e-3)

    def mean_log(mask):
        return np.log(power[mask].mean())

    fine, steep = (far >= 8) & (far < 32), np.minimum(down, across) / np.maximum(np.maximum(down, across), 1)
    assert high == pytest.approx(mean_log((far >= 16) & (far < 32)) - mean_log((far >= 4) & (far < 16)), abs=1e-3)
    assert direction == pytest.approx(mean_log(fine & (across > down)) - mean_log(fine & (across < down)), abs=1e-3)
    assert diagonal == pytest.approx(mean_log(fine & (steep > 0.5)) - mean_log(fine & (steep <= 0.5)), abs=1e-3)
    edge = (down == 32) | (across == 32)
    around = ~edge & (np.maximum(down, across) >= 28)
    assert nyquist == pytest.approx(mean_log(edge) - mean_log(around), abs=1e-3)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
def test_the_slope_of_a_drawn_spectrum(exponent):
    generator = np.random.default_rng(4)
    far = np.hypot(*np.meshgrid(np.fft.fftfreq(512), np.fft.fftfreq(512), indexing="ij"))
    far[0, 0] = 1
    wave = np.fft.ifft2(np.fft.fft2(generator.normal(size=(512, 512))) / far ** (exponent / 2)).real
    level = np.clip(128 + wave / wave.std() * 30, 0, 255).round().astype(np.uint8)
    tiles = level.reshape(4, 128, 4, 128).swapaxes(1, 2).reshape(16, 128, 128)
    assert spectrum(tiles)[0] == pytest.approx(-exponent, abs=0.25)  # of 16 squares under a window


def test_a_checkerboard_stands_out_at_the_highest_frequency():
    tiles = random_tiles(seed=11)
    plain = spectrum(tiles)[-1]
    pattern = np.indices((64, 64))[1] % 2 * 6
    assert spectrum((tiles // 2 + pattern).astype(np.uint8))[-1] > plain + 1
