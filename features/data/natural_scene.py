"""Statistics of natural scenes: how mean-subtracted contrast-normalised luma and its neighbours are distributed.

Mittal, Moorthy and Bovik (2012), "No-reference image quality assessment in the spatial domain", IEEE TIP 21(12), their
36 numbers: at two scales a generalised Gaussian of the values, asymmetric ones of four products with a neighbour. The
window is binomial (1 4 6 4 1) / 16 each way, standard deviation 1 where theirs has 7/6: exact in integers.
Knows luma at two scales. Must not know what is made of the numbers.

Shapes: T tiles of H x W pixels.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deltaclip.features.data.histogram import Histogram, counts, log_ratio, total

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SCALES = (1, 2)
# Neighbour of each pixel: (down, across).
NEIGHBOURS = {"right": (0, 1), "below": (1, 0), "diagonal": (1, 1), "antidiagonal": (1, -1)}
OF_VALUES = ("shape", "spread")
OF_PRODUCTS = ("shape", "mean", "sd_left", "sd_right")
OF_LOCAL = ("local_p10", "local_p50", "local_p90", "local_variation")
NAMES: tuple[str, ...] = tuple(
    f"{name}_{scale}"
    for scale in SCALES
    for name in (
        *OF_LOCAL,
        *(f"mscn_{word}" for word in OF_VALUES),
        *(f"mscn_{neighbour}_{word}" for neighbour in NEIGHBOURS for word in OF_PRODUCTS),
    )
)
TAPS = 4  # additions of neighbours that make the window: (1 1) * (1 1) * (1 1) * (1 1)
WEIGHT = 256  # sum of the window both ways
SHAPES = (0.1, 10.0)  # range of a generalised Gaussian's exponent: 1 is Laplace, 2 is Gauss
MOST_SD = 127.5  # of 8-bit luma
FLOOR = 0.1  # grey levels below which a deviation is none
TILES_AT_ONCE = 3  # 200 KB of float32, which processors keep close: nine at once take twice as long
LEAST = 1e-6  # of squares: values of a constant picture are 0


class Normalised(NamedTuple):
    """`value_THW` mean-subtracted contrast-normalised luma, `sd_THW` the local standard deviation; both float32."""

    value_THW: NDArray[np.float32]
    sd_THW: NDArray[np.float32]


def scene_of(scales: Sequence[NDArray[np.uint8]]) -> dict[str, float]:
    """Return the numbers of `NAMES` from luma (T, H, W) at full and half size."""
    numbers: list[float] = []
    for luma_THW in scales[: len(SCALES)]:
        sums_K6, local = np.zeros((1 + len(NEIGHBOURS), 6)), Local.none()
        for start in range(0, len(luma_THW), TILES_AT_ONCE):
            value_THW, sd_THW = normalised(luma_THW[start : start + TILES_AT_ONCE])
            local = local.with_those(Local.of(sd_THW))
            together = [value_THW.ravel(), *(products(value_THW, step) for step in NEIGHBOURS.values())]
            sums_K6 += [side_sums(value_M) for value_M in together]
        numbers += [*local.numbers(), *gaussian(sums_K6[0])]
        for sums_6 in sums_K6[1:]:
            numbers += asymmetric_gaussian(sums_6)
    return dict(zip(NAMES, numbers, strict=True))


def normalised(luma_THW: NDArray[np.uint8]) -> Normalised:
    """Return (luma - m) / (sd + 1) with m and sd of a binomial window around each pixel; (T, H - 4, W - 4).

    All is exact up to the root: 256 * 255 squared fits 32 bits, and so does 256 times the windowed square.
    """
    sum_THW = _windowed(luma_THW.astype(np.uint16))
    square_THW = _windowed(np.square(luma_THW, dtype=np.uint32))
    total_THW = sum_THW.astype(np.uint32)
    variance_THW = square_THW * np.uint32(WEIGHT) - total_THW * total_THW  # of 256 times the luma
    sd_THW: NDArray[np.float32] = np.sqrt(variance_THW.astype(np.float32))
    inner_THW = luma_THW[:, TAPS // 2 : -TAPS // 2, TAPS // 2 : -TAPS // 2]
    centred_THW = inner_THW.astype(np.float32) * np.float32(WEIGHT) - sum_THW.astype(np.float32)
    value_THW: NDArray[np.float32] = centred_THW / (sd_THW + np.float32(WEIGHT))
    return Normalised(value_THW, sd_THW * np.float32(1 / WEIGHT))


def _windowed(plane_THW: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    for _ in range(TAPS):
        plane_THW = plane_THW[:, :, 1:] + plane_THW[:, :, :-1]
    for _ in range(TAPS):
        plane_THW = plane_THW[:, 1:] + plane_THW[:, :-1]
    return plane_THW


def products(value_THW: NDArray[np.float32], step: tuple[int, int]) -> NDArray[np.float32]:
    """Return the product of each value with its neighbour `step` (down, across) away, in a row."""
    down, across = step
    height, width = value_THW.shape[1:]
    here = value_THW[:, : height - down, max(0, -across) : width - max(0, across)]
    there = value_THW[:, down:, max(0, across) : width + min(0, across)]
    return (here * there).ravel()


class Local(NamedTuple):
    """Sums over local standard deviations: counts of their levels, their sum, that of their squares, their number."""

    count_K: NDArray[np.int64]
    total: float
    square: float
    size: int

    @classmethod
    def none(cls) -> Local:
        """Return those of nothing."""
        return cls(np.zeros(256, dtype=np.int64), 0.0, 0.0, 0)

    @classmethod
    def of(cls, sd_THW: NDArray[np.float32]) -> Local:
        """Return those of a plane; levels are of the root, finest where noise is told from none."""
        levels = (np.sqrt(sd_THW) * np.float32(255 / math.sqrt(MOST_SD)) + np.float32(0.5)).astype(np.uint8)
        return cls(counts(levels), total(sd_THW), total(np.square(sd_THW)), sd_THW.size)

    def with_those(self, other: Local) -> Local:
        """Return the sums over both."""
        count_K = self.count_K + other.count_K
        return Local(count_K, self.total + other.total, self.square + other.square, self.size + other.size)

    def numbers(self) -> list[float]:
        """Return logs of three quantiles, and of the spread of the local deviation over its mean."""
        levels = Histogram(self.count_K)
        quantiles = [(levels.quantile(share) / 255) ** 2 * MOST_SD for share in (0.1, 0.5, 0.9)]
        mean = self.total / self.size
        spread = math.sqrt(max(self.square / self.size - mean**2, 0))
        return [*(math.log(value + FLOOR) for value in quantiles), log_ratio(spread, mean, FLOOR)]


def side_sums(value_M: NDArray[np.float32]) -> list[float]:
    """Return what the fits need: sum of absolute values; sum of squares and number of the negative, of the positive; M.

    Each side by itself: a difference of sums would leave of a side without members what the rounding makes of it.
    """
    size_M = np.abs(value_M)
    found = [total(size_M)]
    # |x| - x and |x| + x are exact: 0, or twice the absolute value; 4 times as fast as numpy's minimum and maximum.
    for twice_M, is_side_M in ((size_M - value_M, value_M < 0), (size_M + value_M, value_M > 0)):
        found += [total(np.square(twice_M, out=twice_M)) / 4, float(np.count_nonzero(is_side_M))]
    return [*found, value_M.size]


def gaussian(sums_6: NDArray[np.float64]) -> list[float]:
    """Return logs of the exponent and of the standard deviation of a generalised Gaussian, from `side_sums`."""
    absolute, left_square, _, right_square, _, size = sums_6.tolist()
    mean_size, mean_square = absolute / size, (left_square + right_square) / size
    return [math.log(shape_of((mean_size**2 + LEAST) / (mean_square + LEAST))), math.log(mean_square + LEAST) / 2]


def asymmetric_gaussian(sums_6: NDArray[np.float64]) -> list[float]:
    """Fit an asymmetric generalised Gaussian by its moments (Lasmar, Stitou and Berthoumieu 2009).

    Args:
        sums_6: as `side_sums` gives them.

    Returns:
        log of the exponent; the mean; logs of the left and of the right standard deviation.
    """
    absolute, left_square, num_left, right_square, num_right, size = sums_6.tolist()
    mean_size, mean_square = absolute / size, (left_square + right_square) / size
    left = math.sqrt(left_square / max(num_left, 1) + LEAST)
    right = math.sqrt(right_square / max(num_right, 1) + LEAST)
    ratio = left / right
    adjust = (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shape = shape_of((mean_size**2 + LEAST) / (mean_square + LEAST) * adjust)
    gammas = {times: math.lgamma(times / shape) for times in (1, 2, 3)}
    mean = (right - left) * math.exp(gammas[2] - (gammas[1] + gammas[3]) / 2)
    return [math.log(shape), mean, math.log(left), math.log(right)]


def shape_of(ratio: float) -> float:
    """Return the exponent a of the generalised Gaussian with (E|x|)^2 / E x^2 = `ratio`, within `SHAPES`.

    The ratio is G(2/a)^2 / (G(1/a) G(3/a)) and rises with a (Sharifi and Leon-Garcia 1995).
    """
    log_shape, log_ratio_of = _shape_table()
    return math.exp(float(np.interp(math.log(ratio), log_ratio_of, log_shape)))


@functools.cache
def _shape_table() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    # 2,000 steps: interpolation is exact to 1e-6, the search over a step of .001 that is usual to 1e-3.
    log_shape = np.linspace(math.log(SHAPES[0]), math.log(SHAPES[1]), 2001)
    inverse = np.exp(-log_shape)
    gamma = {times: np.array([math.lgamma(times * one) for one in inverse]) for times in (1, 2, 3)}
    return log_shape, 2 * gamma[2] - gamma[1] - gamma[3]
