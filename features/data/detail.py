"""Sharpness, noise, traces of coding and the spectrum of a picture: what blur, noise, enlarging and JPEG leave.

Knows luma at four scales and both colour differences. Must not know what is made of the numbers.

Shapes: T tiles of H x W pixels.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from deltaclip.features.data.histogram import Histogram, log_ratio, mean_of, mean_square_of, total
from deltaclip.features.data.views import tile_corners

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Unsigned = TypeVar("Unsigned", np.uint8, np.uint16)  # differences of 8 bits fit 8 bits, so they are taken absolute
SCALES = (1, 2, 4, 8)
FINE = SCALES[:3]  # at an eighth, little is left that is not the picture's own
OF_GRADIENTS = ("gradient_mean", "gradient_p99", "gradient_sparsity", "gradient_flat", "gradient_direction")
OF_FINE = ("laplacian", "reblur", "noise")
OF_CHROMA = ("gradient", "noise")
OF_BLOCKS = ("grid", "phase", "crossings")
OF_SPECTRUM = ("slope", "curvature", "high", "direction", "diagonal", "nyquist")
NAMES: tuple[str, ...] = (
    *(f"{name}_{scale}" for scale in SCALES for name in OF_GRADIENTS),
    *(f"{name}_{scale}" for scale in FINE for name in OF_FINE),
    *(f"chroma_{plane}_{name}" for plane in ("blue", "red") for name in OF_CHROMA),
    *(f"block_{name}_{way}" for way in ("across", "down") for name in OF_BLOCKS),
    *(f"spectrum_{name}" for name in OF_SPECTRUM),
)
FLOOR = 0.1  # grey levels below which a difference is none: a tenth of a quantisation step
BLOCK = 8  # of JPEG
PATCH = 64  # side of the squares whose spectrum is taken
LOWEST, HIGHEST = 2, 28  # radii of the line: below lies the window, above the corners


def detail_of(
    scales: Sequence[NDArray[np.uint8]], blue_THW: NDArray[np.uint8], red_THW: NDArray[np.uint8]
) -> dict[str, float]:
    """Return the numbers of `NAMES` from luma (T, H, W) at the scales 1, 1/2, 1/4, 1/8 and full colour differences."""
    numbers: list[float] = []
    steps = [Steps.of(luma_THW) for luma_THW in scales]
    for of_scale in steps:
        numbers += _gradients(of_scale)
    for luma_THW, of_scale in zip(scales[: len(FINE)], steps, strict=False):
        numbers += [_laplacian(luma_THW), _reblur(luma_THW, of_scale), noise(luma_THW)]
    for plane_THW in (blue_THW, red_THW):
        across, down = Steps.of(plane_THW)
        mean = (total(across) + total(down)) / (across.size + down.size)
        numbers += [math.log(mean + FLOOR), noise(plane_THW)]
    for axis, step_THW in zip((2, 1), steps[0], strict=True):
        numbers += [*blockiness(step_THW, axis), _crossings(scales[0], axis)]
    numbers += spectrum(scales[0])
    return dict(zip(NAMES, numbers, strict=True))


class Steps(NamedTuple):
    """Absolute differences of neighbours, uint8: (T, H, W - 1) and (T, H - 1, W)."""

    across_THW: NDArray[np.uint8]
    down_THW: NDArray[np.uint8]

    @classmethod
    def of(cls, plane_THW: NDArray[np.uint8]) -> Steps:
        """Return those of a plane."""
        return cls(
            _difference(plane_THW[:, :, 1:], plane_THW[:, :, :-1]), _difference(plane_THW[:, 1:], plane_THW[:, :-1])
        )


def _difference(first: NDArray[Unsigned], second: NDArray[Unsigned]) -> NDArray[Unsigned]:
    return np.maximum(first, second) - np.minimum(first, second)


def _gradients(steps: Steps) -> list[float]:
    across, down = (Histogram.of(plane) for plane in steps)
    both = Histogram(across.share_K + down.share_K)
    mean, mean_square = both.mean(), both.mean_square()
    return [
        math.log(mean + FLOOR),
        math.log(both.quantile(0.99) + 1),
        log_ratio(mean_square, mean**2, FLOOR**2) / 2,
        both.share(0, 1),
        log_ratio(across.mean(), down.mean(), FLOOR),
    ]


def _laplacian(luma_THW: NDArray[np.uint8]) -> float:
    """Return the log of the standard deviation of the Laplacian (0 1 0, 1 -4 1, 0 1 0), Pech-Pacheco et al. (2000)."""
    level_THW = luma_THW.astype(np.int16)
    found_THW = _bend(level_THW, 1)[:, :, 1:-1]
    found_THW = found_THW + _bend(level_THW[:, 1:-1], 2)
    variance = mean_square_of(found_THW) - mean_of(found_THW) ** 2
    return math.log(math.sqrt(max(variance, 0)) + FLOOR)


def _reblur(luma_THW: NDArray[np.uint8], steps: Steps) -> float:
    """Return how much of the differences a mean of nine pixels in a row leaves, 0 to 1; the blurrier way counts.

    Crété, Dolmière, Ladret and Nicolas (2007), "The blur effect". In ninths of a level, so that all is exact.
    """
    return max(_left_by_blur(luma_THW, step_THW, axis) for axis, step_THW in zip((2, 1), steps, strict=True))


def _left_by_blur(luma_THW: NDArray[np.uint8], step_THW: NDArray[np.uint8], axis: int) -> float:
    def part(plane: NDArray[Unsigned], start: int, stop: int | None = None) -> NDArray[Unsigned]:
        return plane[:, :, start:stop] if axis == 2 else plane[:, start:stop]

    nine = luma_THW.astype(np.uint16)
    last = part(nine, BLOCK)
    for shift in (1, 2, 4):  # sums of 2, 4, 8
        nine = part(nine, shift) + part(nine, 0, -shift)
    nine = part(nine, 0, -1) + last
    blurred = _difference(part(nine, 1), part(nine, 0, -1))
    sharp = part(step_THW, 4, -4) * np.uint16(9)
    lost = np.maximum(sharp, blurred)
    lost -= blurred
    return 1 - mean_of(lost) / (mean_of(sharp) + FLOOR)


def noise(plane_THW: NDArray[np.uint8]) -> float:
    """Return the log of Immerkær's (1996) estimate of the noise: mean of |1 -2 1 by 1 -2 1| times sqrt(pi / 2) / 6."""
    down_THW = _bend(plane_THW.astype(np.int16), 1)
    found_THW = _bend(down_THW, 2)
    return math.log(mean_of(np.abs(found_THW, out=found_THW)) * math.sqrt(math.pi / 2) / 6 + FLOOR)


def _bend(level_THW: NDArray[np.int16], axis: int) -> NDArray[np.int16]:
    """Return the second difference (1 -2 1) along an axis: a step less the one before it."""
    if axis == 1:
        step_THW = level_THW[:, 1:] - level_THW[:, :-1]
        return step_THW[:, 1:] - step_THW[:, :-1]
    step_THW = level_THW[:, :, 1:] - level_THW[:, :, :-1]
    return step_THW[:, :, 1:] - step_THW[:, :, :-1]


def blockiness(step_THW: NDArray[np.uint8], axis: int) -> tuple[float, float]:
    """Return how much larger differences are between blocks of 8 than inside them (Wang, Sheikh and Bovik 2002).

    Args:
        step_THW: absolute differences along `axis`, from the first pixel on.
        axis: 1 (down) or 2 (across).

    Returns:
        Logs of two ratios: of the mean where blocks of a JPEG file meet to that elsewhere, and of the largest among the
        means of the eight places of a block to that of all, which a grid that was shifted shows too.
    """
    sum_M = step_THW.sum(axis=(0, 3 - axis), dtype=np.int64)
    place_M = np.arange(len(sum_M)) % BLOCK
    count = step_THW.size // len(sum_M) * np.bincount(place_M, minlength=BLOCK)
    mean_K = np.bincount(place_M, weights=sum_M, minlength=BLOCK) / count
    inside = float(mean_K[:-1].sum()) / (BLOCK - 1)
    return (
        log_ratio(float(mean_K[-1]), inside, FLOOR),
        log_ratio(float(mean_K.max()), float(mean_K.sum()) / BLOCK, FLOOR),
    )


def _crossings(luma_THW: NDArray[np.uint8], axis: int) -> float:
    """Return the share of pixels at which luma turns from rising to falling or back (Wang, Sheikh and Bovik 2002)."""
    rows_THW = luma_THW if axis == 2 else luma_THW.swapaxes(1, 2)
    rises, falls = (compare(rows_THW[:, :, 1:], rows_THW[:, :, :-1]) for compare in (np.greater, np.less))
    turns = (rises[:, :, 1:] & falls[:, :, :-1]) | (falls[:, :, 1:] & rises[:, :, :-1])
    return np.count_nonzero(turns) / turns.size


def spectrum(luma_THW: NDArray[np.uint8]) -> list[float]:
    """Return the numbers of `OF_SPECTRUM` of the mean power over squares of 64 pixels under a Hann window.

    Power of natural pictures falls by about the square of frequency (Field 1987; van der Schaaf and van Hateren 1996).
    """
    height, width = luma_THW.shape[1:]
    if len(luma_THW) == 1:
        tops, lefts = tile_corners(height, width, PATCH, PATCH)
    else:  # of each tile its middle
        tops, lefts = [(height - PATCH) // 2], [(width - PATCH) // 2]
    patches = [luma_THW[:, top : top + PATCH, left : left + PATCH] for top in tops for left in lefts]
    patch_PMM = np.concatenate(patches).astype(np.float32)
    patch_PMM -= patch_PMM.mean(axis=(1, 2), keepdims=True)
    masks = _spectrum_masks()
    amplitude_PMF = np.fft.rfft2(patch_PMM * masks.window_MM)
    power_MF = (np.square(amplitude_PMF.real) + np.square(amplitude_PMF.imag)).mean(axis=0).astype(np.float64)
    power_MF = power_MF + masks.floor

    def mean_log(mask_MF: NDArray[np.bool_]) -> float:
        weight_MF = masks.weight_MF * mask_MF
        return math.log(float((power_MF * weight_MF).sum()) / float(weight_MF.sum()))

    radius = masks.radius_MF.ravel()
    mean_R = np.bincount(radius, (power_MF * masks.weight_MF).ravel()) / np.bincount(radius, masks.weight_MF.ravel())
    log_power_R = np.log(mean_R[LOWEST : HIGHEST + 1])
    slope, curvature = (float((log_power_R * basis_R).sum()) for basis_R in masks.line_and_bend)
    high, middle, across, down, diagonal, axial, nyquist, around = (mean_log(mask) for mask in masks.regions)
    return [slope, curvature, high - middle, across - down, diagonal - axial, nyquist - around]


class _Masks(NamedTuple):
    window_MM: NDArray[np.float32]
    floor: float
    radius_MF: NDArray[np.int64]
    weight_MF: NDArray[np.float64]
    line_and_bend: tuple[NDArray[np.float64], NDArray[np.float64]]
    regions: tuple[NDArray[np.bool_], ...]


@functools.cache
def _spectrum_masks() -> _Masks:
    hann_M = np.sin(np.pi * (np.arange(PATCH) + 0.5) / PATCH) ** 2
    window_MM = np.outer(hann_M, hann_M)
    down_M1 = np.abs(np.fft.fftfreq(PATCH, 1 / PATCH))[:, None]
    across_1F = np.arange(PATCH // 2 + 1.0)[None]
    far = np.hypot(down_M1, across_1F)
    radius_MF = far.round().astype(np.int64)
    line_R = np.log(np.arange(LOWEST, HIGHEST + 1))
    line_R = line_R - line_R.mean()
    bend_R = line_R**2 - (line_R**2).mean() - line_R * ((line_R**3).sum() / (line_R**2).sum())
    half = PATCH // 2
    edge = (down_M1 == half) | (across_1F == half)
    steep = np.minimum(down_M1, across_1F) / np.maximum(np.maximum(down_M1, across_1F), 1)
    fine = (far >= half / 4) & (far < half)
    return _Masks(
        window_MM=window_MM.astype(np.float32),
        floor=FLOOR**2 * float((window_MM**2).sum()),
        radius_MF=radius_MF,
        # The half that the transform of real numbers leaves out mirrors all but the first and the last column.
        weight_MF=np.where((across_1F > 0) & (across_1F < half), 2.0, 1.0) + 0 * down_M1,
        line_and_bend=(line_R / (line_R**2).sum(), bend_R / (bend_R**2).sum()),
        regions=(
            (far >= half / 2) & (far < half),
            (far >= half / 8) & (far < half / 2),
            fine & (across_1F > down_M1),
            fine & (across_1F < down_M1),
            fine & (steep > 0.5),
            fine & (steep <= 0.5),
            edge,
            ~edge & (np.maximum(down_M1, across_1F) >= half - 4),
        ),
    )
