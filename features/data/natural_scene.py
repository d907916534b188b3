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
PIXELS_AT_ONCE = 49_152  # 200 KB of float32, which processors keep close: three times as many take half as long again
LEAST = 1e-6  # of squares: values of a constant picture are 0


class Normalised(NamedTuple):
    """`value_THW` mean-subtracted contrast-normalised luma, `sd_THW` the local standard deviation; both float32.

    What belongs to the pixel (y, x) stands at (y - 2, x - 2); the last four rows and columns of a tile are 0, so that a
    product with a neighbour that lies outside is 0, wherever the numbers after a row's end are those of the next.
    """

    value_THW: NDArray[np.float32]
    sd_THW: NDArray[np.float32]


def scene_of(scales: Sequence[NDArray[np.uint8]]) -> dict[str, float]:
    """Return the numbers of `NAMES` from luma (T, H, W) at full and half size."""
    numbers: list[float] = []
    for luma_THW in scales[: len(SCALES)]:
        sums_K6, local = np.zeros((1 + len(NEIGHBOURS), 6)), Local.none()
        at_once = max(1, PIXELS_AT_ONCE // luma_THW[0].size)
        for start in range(0, len(luma_THW), at_once):
            value_THW, sd_THW = normalised(luma_THW[start : start + at_once])
            local = local.with_those(Local.of(sd_THW))
            sides = Sides.of(value_THW)
            sums_K6 += [side_sums(sides), *(side_sums(sides, step) for step in NEIGHBOURS.values())]
        numbers += [*local.numbers(), *gaussian(sums_K6[0])]
        for sums_6 in sums_K6[1:]:
            numbers += asymmetric_gaussian(sums_6)
    return dict(zip(NAMES, numbers, strict=True))


def normalised(luma_THW: NDArray[np.uint8]) -> Normalised:
    """Return (luma - m) / (sd + 1) with m and sd of a binomial window around each pixel; both (T, H, W).

    All is exact up to the root: 256 * 255 squared fits 32 bits, and so does 256 times the windowed square. Tiles are
    one long row here, three times as fast as many short ones: windows over the end of a row are made, and not kept.
    """
    height, width = luma_THW.shape[1:]
    luma_N = luma_THW.reshape(-1)
    sum_M = _windowed(luma_N.astype(np.uint16), width)
    variance_M = _windowed(np.square(luma_N, dtype=np.uint32), width)
    variance_M *= np.uint32(WEIGHT)
    total_M = sum_M.astype(np.uint32)
    variance_M -= np.square(total_M, out=total_M)  # of 256 times the luma
    value_THW, sd_THW = (np.zeros(luma_THW.shape, dtype=np.float32) for _ in range(2))
    value_M, sd_M = (plane.reshape(-1)[: len(sum_M)] for plane in (value_THW, sd_THW))
    np.sqrt(variance_M.astype(np.float32), out=sd_M)
    first = TAPS // 2 * (width + 1)
    np.multiply(luma_N[first : first + len(sum_M)], np.float32(WEIGHT), out=value_M)
    value_M -= sum_M
    value_M /= sd_M + np.float32(WEIGHT)
    sd_M *= np.float32(1 / WEIGHT)
    for plane in (value_THW, sd_THW):
        plane[:, height - TAPS :] = 0
        plane[:, :, width - TAPS :] = 0
    return Normalised(value_THW, sd_THW)


def _windowed(row_N: NDArray[np.unsignedinteger], width: int) -> NDArray[np.unsignedinteger]:
    for step in (1, width):
        for _ in range(TAPS):
            row_N = row_N[step:] + row_N[:-step]
    return row_N


class Sides(NamedTuple):
    """What sums over values and over products of neighbours are made of, (N,) each, with zeros behind the last tile.

    Absolute values, squares, squares with the sign of the value; which are negative, which positive. `shape` is that
    of the tiles, (T, H, W).
    """

    size_N: NDArray[np.float32]
    square_N: NDArray[np.float32]
    signed_N: NDArray[np.float32]
    is_below_N: NDArray[np.bool_]
    is_above_N: NDArray[np.bool_]
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, value_THW: NDArray[np.float32]) -> Sides:
        """Return those of values as `normalised` gives them."""
        tiles, height, width = value_THW.shape
        value_N = np.zeros(value_THW.size + width + 1, dtype=np.float32)
        value_N[: value_THW.size] = value_THW.reshape(-1)
        size_N = np.abs(value_N)
        return cls(size_N, np.square(value_N), value_N * size_N, value_N < 0, value_N > 0, (tiles, height, width))


def side_sums(sides: Sides, step: tuple[int, int] | None = None) -> list[float]:
    """Return what the fits need, of the values or of the product of each with its neighbour.

    `step` is how far away (down, across) that neighbour is. Sum of absolute values; sum of squares and number of the
    negative, of the positive; number of all. A product's absolute value is that of the absolute values, and so on: no
    product is kept. Sums over a row are float32.
    """
    tiles, height, width = sides.shape
    down, across = step or (0, 0)
    number, shift = tiles * height * width, down * width + across
    found = []
    for plane_N in sides[:3]:
        here_RW = plane_N[:number].reshape(-1, width)
        there_RW = plane_N[shift : shift + number].reshape(-1, width)
        of_rows = np.einsum("rw->r", here_RW) if step is None else np.einsum("rw,rw->r", here_RW, there_RW)
        found.append(float(of_rows.sum(dtype=np.float64)))
    (below_N, above_N), (later_below_N, later_above_N) = (
        (sides.is_below_N[start : start + number], sides.is_above_N[start : start + number]) for start in (0, shift)
    )
    if step is None:
        num_left, num_right = np.count_nonzero(below_N), np.count_nonzero(above_N)
    else:
        num_left = np.count_nonzero(below_N & later_above_N) + np.count_nonzero(above_N & later_below_N)
        num_right = np.count_nonzero(below_N & later_below_N) + np.count_nonzero(above_N & later_above_N)
    absolute, square, signed = found
    # A side without members is 0, not what the rounding of a difference makes of it.
    left, right = (max(square - signed, 0) / 2 if num_left else 0.0, max(square + signed, 0) / 2 if num_right else 0.0)
    size = tiles * (height - TAPS - down) * (width - TAPS - abs(across))
    return [absolute, left, float(num_left), right, float(num_right), size]


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
        """Return those of a plane of `normalised`; levels are of the root, finest where noise is told from none."""
        tiles, height, width = sd_THW.shape
        size = tiles * (height - TAPS) * (width - TAPS)
        root_THW = np.sqrt(sd_THW)
        root_THW *= np.float32(255 / math.sqrt(MOST_SD))
        root_THW += np.float32(0.5)
        count_K = counts(root_THW.astype(np.uint8))
        count_K[0] -= sd_THW.size - size  # of the zeros at the ends
        square_TH = np.einsum("tyx,tyx->ty", sd_THW, sd_THW)
        return cls(count_K, total(sd_THW), float(square_TH.sum(dtype=np.float64)), size)

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
