"""The view `statistics`: named numbers of a picture's pixels at their own size, which embeddings of a resized one lose.

Measured on at most 147,456 native pixels, so that a large picture costs little more than one of 384 x 384.
Sums are of integers, or of floats in one fixed order, and no library that shares its work among threads takes part:
equal pixels give equal bits. Knows pixels and the formulas' sources. Must not know models, caches or labels.

Shapes: T tiles of H x W pixels, S numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from deltaclip.features.data import detail, natural_scene
from deltaclip.features.data.histogram import Histogram, mean_of
from deltaclip.features.data.pillow import cut

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILE = 128  # pixels each way at most
MOST_CELLS = 3  # tiles each way at most: nine of them, 147,456 pixels
BLOCK = 8  # of JPEG: its grid stays where it was; and three halvings come out even
MIN_SIDE = 64  # a smaller picture is continued by its mirror image: filters and scales then need no special cases
COLOUR_SIDE = 160  # colours change slowly: 25,600 of 262,144 pixels move no mean of AGIQA-3K by more than 1 %
SCALES = (1, 2, 4, 8)

GEOMETRY = ("size_area", "size_short_side", "size_aspect")
TONE = (
    "tone_mean",
    "tone_contrast",
    "tone_skewness",
    "tone_kurtosis",
    "tone_p01",
    "tone_p10",
    "tone_p50",
    "tone_p90",
    "tone_p99",
    "tone_entropy",
    "tone_black",
    "tone_white",
    "tone_unused",
)
COLOUR = (
    "colour_colourfulness",
    "colour_rg_mean",
    "colour_rg_spread",
    "colour_yb_mean",
    "colour_yb_spread",
    "colour_rg_yb_correlation",
    "colour_saturation_mean",
    "colour_saturation_spread",
    "colour_saturation_p10",
    "colour_saturation_p90",
    "colour_hue_entropy",
    "colour_grey",
    "colour_dark_channel",
)
NAMES: tuple[str, ...] = (*GEOMETRY, *TONE, *COLOUR, *detail.NAMES, *natural_scene.NAMES)


class Planes(NamedTuple):
    """Native pixels of a picture: luma and both colour differences, each uint8 (T, H, W), H and W multiples of 8."""

    luma_THW: NDArray[np.uint8]
    blue_THW: NDArray[np.uint8]
    red_THW: NDArray[np.uint8]


def statistics_of(image: Image.Image) -> NDArray[np.float32]:
    """Return the numbers of `NAMES` of a picture.

    Args:
        image: RGB, of any size.

    Returns:
        (S,) float32, finite; heavy-tailed ones as logarithms. `docs/statistics.md` says what each is and whose.

    Raises:
        ValueError: the picture is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"an RGB picture is needed, not one of mode {image.mode}")
    planes = native_planes(image)
    scales = [planes.luma_THW, *(_halved(planes.luma_THW, scale) for scale in SCALES[1:])]
    found = _geometry(image.size) | _tone(planes.luma_THW) | _colour(image)
    found |= detail.detail_of(scales, planes.blue_THW, planes.red_THW) | natural_scene.scene_of(scales[:2])
    return np.array([found[name] for name in NAMES], dtype=np.float32)


def native_planes(image: Image.Image) -> Planes:
    """Return the pixels that are measured: tiles of at most `TILE`, in the middle of each cell of an even grid.

    The grid has at most `MOST_CELLS` cells each way, so that up to 384 pixels next to nothing is left out.
    """
    width, height = image.size
    (tops, tile_height), (lefts, tile_width) = _tiling(height), _tiling(width)
    # One tall picture of all tiles: each is cut, and all are converted at once.
    tall = Image.new("RGB", (tile_width, tile_height * len(tops) * len(lefts)))
    for number, (top, left) in enumerate((top, left) for top in tops for left in lefts):
        tall.paste(cut(image, (left, top, left + tile_width, top + tile_height)), (0, number * tile_height))
    # JPEG's own colours (ITU-R BT.601, full range), in Pillow's integers.
    bands = (np.asarray(band).reshape(-1, tile_height, tile_width) for band in tall.convert("YCbCr").split())
    return Planes(*(_at_least(MIN_SIDE, band_THW) for band_THW in bands))


def _tiling(side: int) -> tuple[list[int], int]:
    """Return where tiles start and how long they are, multiples of 8; a side below `MIN_SIDE` is one."""
    if side < MIN_SIDE:
        return [0], side
    count = min(-(-side // TILE), MOST_CELLS)
    length = min(side // count, TILE) // BLOCK * BLOCK
    middles = ((2 * number + 1) * side // (2 * count) for number in range(count))
    return [(middle - length // 2) // BLOCK * BLOCK for middle in middles], length


def _at_least(side: int, plane_THW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    missing = [(0, 0), *((0, max(0, side - length)) for length in plane_THW.shape[1:])]
    return np.pad(plane_THW, missing, mode="symmetric") if min(plane_THW.shape[1:]) < side else plane_THW


def _halved(plane_THW: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Return means over squares of `factor` pixels, rounded to 8 bits."""
    tiles, height, width = plane_THW.shape
    tall = Image.fromarray(plane_THW.reshape(tiles * height, width))
    return np.asarray(tall.reduce(factor)).reshape(tiles, height // factor, width // factor)


def _geometry(size: tuple[int, int]) -> dict[str, float]:
    width, height = size
    found = np.log2([width * height, min(size), width / height])
    return dict(zip(GEOMETRY, found.tolist(), strict=True))


def _tone(luma_THW: NDArray[np.uint8]) -> dict[str, float]:
    levels = Histogram.of(luma_THW)
    spread, unit = levels.spread(), 1 / 255
    found = [
        levels.mean() * unit,
        spread * unit,
        levels.moment(3) / (spread**3 + 1),
        np.log((levels.moment(4) + 1) / (spread**4 + 1)),
        *(levels.quantile(share) * unit for share in (0.01, 0.1, 0.5, 0.9, 0.99)),
        levels.entropy(),
        np.sqrt(levels.share(0, 4)),
        np.sqrt(levels.share(251, 255)),
        levels.unused(),
    ]
    return dict(zip(TONE, map(float, found), strict=True))


def _colour(image: Image.Image) -> dict[str, float]:
    """Return what the colours are, of an even lattice of pixels where there are many."""
    lattice = (min(image.width, COLOUR_SIDE), min(image.height, COLOUR_SIDE))
    small = image.resize(lattice, Image.Resampling.NEAREST)
    red, green, blue = (np.asarray(band).reshape(-1).astype(np.int32) for band in small.split())
    # Hasler and Süsstrunk (2003); twice their yb, to stay in integers.
    rg, yb2 = red - green, red + green - 2 * blue
    rg_mean, yb_mean = mean_of(rg), mean_of(yb2) / 2
    # Sums of squares of 25,600 differences of at most 510 each fit 64 bits, and so exact.
    rg_var, yb_var = mean_of(np.square(rg)) - rg_mean**2, mean_of(np.square(yb2)) / 4 - yb_mean**2
    shared = mean_of(rg * yb2) / 2 - rg_mean * yb_mean
    colourfulness = np.sqrt(rg_var + yb_var) + 0.3 * np.hypot(rg_mean, yb_mean)
    hue, saturation, _ = small.convert("HSV").split()
    saturations = Histogram.of(np.asarray(saturation))
    # A hue means the less, the less colour there is: weighted by it.
    hues = np.bincount(np.asarray(hue).ravel() // 8, weights=np.asarray(saturation).ravel(), minlength=32)
    found = [
        np.log(colourfulness + 1),
        rg_mean / 255,
        np.log(np.sqrt(rg_var) + 1),
        yb_mean / 255,
        np.log(np.sqrt(yb_var) + 1),
        shared / (np.sqrt(rg_var * yb_var) + 1),
        saturations.mean() / 255,
        saturations.spread() / 255,
        saturations.quantile(0.1) / 255,
        saturations.quantile(0.9) / 255,
        Histogram(hues).entropy(),
        saturations.share(0, 15),
        mean_of(np.minimum(np.minimum(red, green), blue)) / 255,
    ]
    return dict(zip(COLOUR, map(float, found), strict=True))
