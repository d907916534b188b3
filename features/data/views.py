"""Views of an image: which there are, what each is made of, and the pixels of those that CLIP does not cut itself.

Where activations are kept, augmentation has to be a fixed set: a crop is drawn once, from a seed and the image's own
hash, so that it is the same in every run and for every order of the rows. Knows pixels and names. Must not know models
or caches: how a view becomes a vector stands in `backbone/view_vectors.py`.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from deltaclip.base.errors import UserError, did_you_mean
from deltaclip.features.data.anchors import ANCHOR_RECIPE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch
    from numpy.typing import NDArray
    from PIL import Image


# ---- Views of an image: which there are, what each is made of, and the pixels of those that CLIP does not cut itself


CENTER = "center"
STAGES = "stages"
STATISTICS = "statistics"
ANCHORS: Final = "anchors"  # of no image: embeddings of prompts, once a cache
MAX_TILES = 9  # a 3 x 3 grid: as much as 9 forward passes an image, so the cost has a bound whatever the resolution
# 384 for 224: quality of AGIQA-3K by means of MobileNetV2 stages, SROCC .820; 512 adds .003 at 1.8 times the pixels.
WHOLE_SCALE = Fraction(12, 7)
WHOLE_ASPECT = 2  # a whole image costs at most twice a square one
MAX_BLOCKS = 12  # a tower of 24 or 48 blocks of 1,280 channels would give 30,000 and more numbers an image
OF_TOWER = "tower"  # part of a recipe that follows from the backbone, whose identity is compared by itself
# What makes a view, beside the backbone: part of its identity, so a change here must change a word of the recipe.
RECIPES: dict[str, dict[str, Any]] = {
    CENTER: {"pixels": "preprocessing of the backbone", "vector": "unit length"},
    "flip": {"pixels": "center, mirrored left to right", "vector": "unit length"},
    "tiles": {
        "pixels": "crops of the input size at native resolution, one in the middle of each cell of an even grid",
        "max_tiles": MAX_TILES,
        "vector": "mean of unit vectors",
    },
    STAGES: {
        "pixels": "whole image where the tower takes any size, else those of center",
        "whole_scale": str(WHOLE_SCALE),
        "whole_aspect": WHOLE_ASPECT,
        "max_blocks": MAX_BLOCKS,
        "vector": "means over space or tokens of the outputs of the blocks, one after the other, not normalised",
        "dtype": "float32",
    },
    # The numbers have no place for what they are, so whoever changes one of them has to raise the version.
    STATISTICS: {
        "pixels": "the picture's own: all of a small one, else nine tiles in an even grid",
        "vector": "named numbers, docs/statistics.md, not normalised",
        "version": 1,
        "dtype": "float32",
    },
    ANCHORS: dict(ANCHOR_RECIPE),
}


def of_images(names: Iterable[str]) -> list[str]:
    """Return those of these views that are vectors of images: all but `anchors`."""
    return [name for name in names if name != ANCHORS]


# What later stages may want, at the price of one pass over the pictures.
DEFAULT_VIEWS = (CENTER, STAGES, STATISTICS, ANCHORS)
LEFT_OUT = "views_left_out"  # among the facts of a cache: of the default, what it cannot have, with the reason
NEED_ALL_PIXELS = frozenset({"tiles", STAGES, STATISTICS})


class UnfitBackboneError(UserError):
    """A backbone is not made in a way that gives one of the views."""


@dataclass(frozen=True, kw_only=True)
class ViewChoice:
    """The views to bring up to date: `names`, `center` first.

    Where nobody named any (`is_default`), those that cannot be had are left out; `left_out` has the reasons by name.
    """

    names: tuple[str, ...]
    is_default: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)

    def without(self, reasons: Mapping[str, str]) -> ViewChoice:
        """Return the choice without these views, the reasons kept; what was named by somebody stays."""
        if not self.is_default:
            return self
        new = {name: reason for name, reason in reasons.items() if name in self.names}
        names = tuple(name for name in self.names if name not in new)
        return replace(self, names=names, left_out={**self.left_out, **new})


def choose_views(text: str | None, *, decode: str) -> ViewChoice:
    """Return the views that are asked for, None standing for the default.

    Raises:
        UserError: a name that is no view, or a view that this way of decoding cannot give.
    """
    if text is not None:
        names = parse_views(text)
        check_decode(decode, names)
        return ViewChoice(names=names)
    reduced = NEED_ALL_PIXELS if decode == "draft" else frozenset()
    reason = "--decode draft reads JPEG files at a reduced size"
    return ViewChoice(names=DEFAULT_VIEWS, is_default=True).without(dict.fromkeys(sorted(reduced), reason))


def left_out_lines(facts: Mapping[str, Any], there: Iterable[str]) -> list[str]:
    """Return one line for every reason why a cache lacks views that it would have by default.

    Args:
        facts: of the cache.
        there: the views that it has.
    """
    lacking = {name: reason for name, reason in facts.get(LEFT_OUT, {}).items() if name not in set(there)}
    names = {reason: [name for name in lacking if lacking[name] == reason] for reason in lacking.values()}
    return [f"without {' and '.join(found)}: {reason}" for reason, found in names.items()]


def parse_views(text: str) -> tuple[str, ...]:
    """Return the views that a comma-separated list names, `center` first and in any case.

    Raises:
        UserError: a name that is no view.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in RECIPES:
            raise UserError(f"{name!r} is no view", place="--views", remedy=did_you_mean(name, RECIPES))
    return tuple(dict.fromkeys([CENTER, *names]))


def check_decode(decode: str, views: tuple[str, ...]) -> None:
    """Refuse to read files at a reduced size where a view needs more of it than the model's input.

    Raises:
        UserError: names the view.
    """
    larger = [name for name in views if name in NEED_ALL_PIXELS]
    if decode == "draft" and larger:
        message = f"draft reads JPEG files at a reduced size, and view {larger[0]} needs more"
        raise UserError(message, place="--decode", remedy="give --decode fast or exact, or leave out the view")


def whole_short_side(input_short_side: int) -> int:
    """Return the shortest side of a whole image for a model whose input has this shortest side."""
    return round(input_short_side * WHOLE_SCALE)


def fit_whole(image: Image.Image, short_side: int, *, resample: Image.Resampling) -> NDArray[np.uint8]:
    """Resize a whole image; it keeps its shape up to `WHOLE_ASPECT`, and a longer strip is squeezed to that.

    Args:
        image: RGB.
        short_side: of the result.
        resample: how to resize.

    Returns:
        (1, 3, H, W) uint8, the shorter of H and W `short_side`, the longer at most `WHOLE_ASPECT` times that.
    """
    height, width = fitted_size(image.height, image.width, short_side)
    if image.height > WHOLE_ASPECT * image.width:
        # Pillow does the width first: a strip of 10 x 30,000 would become 384 x 30,000 on its way.
        image = image.resize((image.width, height), resample)
    pixels_HW3 = np.asarray(image.resize((width, height), resample))
    return np.ascontiguousarray(pixels_HW3.transpose(2, 0, 1)[None])


def fitted_size(height: int, width: int, short_side: int) -> list[int]:
    """Return the height and width that a whole image is given by `fit_whole`."""
    shortest, longest = min(height, width), WHOLE_ASPECT * short_side
    return [min(round(length * short_side / shortest), longest) for length in (height, width)]


def cut_tiles(image: Image.Image, height: int, width: int, *, resample: Image.Resampling) -> NDArray[np.uint8]:
    """Cut an image into tiles at its own resolution; one that is smaller than a tile is enlarged until it holds one.

    Args:
        image: RGB.
        height: of a tile, the model's input.
        width: of a tile.
        resample: how to enlarge.

    Returns:
        (K, 3, height, width) uint8 with 1 <= K <= `MAX_TILES`, row by row.
    """
    factor = max(height / image.height, width / image.width)
    if factor > 1:
        enlarged = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
        image = image.resize(enlarged, resample)
    pixels_HW3 = np.asarray(image)
    tops, lefts = tile_corners(image.height, image.width, height, width)
    tiles = [pixels_HW3[top : top + height, left : left + width] for top in tops for left in lefts]
    return np.ascontiguousarray(np.stack(tiles).transpose(0, 3, 1, 2))


def tile_corners(image_height: int, image_width: int, height: int, width: int) -> tuple[list[int], list[int]]:
    """Return the tops and the lefts of the tiles: one in the middle of each cell of an even grid, without overlap.

    The grid has as many cells as tiles fit, at most `MAX_TILES`; of equally many, those that have the shape of a tile.
    """
    most_down, most_across = image_height // height, image_width // width
    grids = [
        (down, across)
        for down in range(1, min(most_down, MAX_TILES) + 1)
        for across in range(1, min(most_across, MAX_TILES) + 1)
        if down * across <= MAX_TILES
    ]

    def preference(grid: tuple[int, int]) -> tuple[int, float, int]:
        down, across = grid
        stretch = math.log((image_height / down / height) / (image_width / across / width))
        return down * across, -round(abs(stretch), 9), -abs(down - across)

    down, across = max(grids, key=preference)
    return _middles(image_height, height, down), _middles(image_width, width, across)


def _middles(length: int, part: int, count: int) -> list[int]:
    # Floors of an even ladder: two steps differ by at least length // count >= part, so tiles never overlap.
    return [((2 * number + 1) * length - count * part) // (2 * count) for number in range(count)]


# ---- The pictures of an image that a boundary file can hold: as it is, mirrored, or one of some crops


FLIP = "flip"
CROP_SEED = 42
SMALLEST_SHARE = 0.5  # of the sides of the largest box of the input's shape: quality has to stay visible
CROP = re.compile(r"crop-([1-9][0-9]?)")


def boundary_recipe(view: str) -> dict[str, Any]:
    """Return what a view is made of, as JSON values.

    Raises:
        UserError: there is no such view.
    """
    if view in {CENTER, FLIP}:
        return {"view": view, "pixels": RECIPES[view]["pixels"]}
    if match := CROP.fullmatch(view):
        return {"view": view, "pixels": "a box of the input's shape", "smallest_share": SMALLEST_SHARE} | {
            "seed": CROP_SEED,
            "number": int(match[1]),
        }
    raise UserError(f"{view!r} is no view of a boundary cache", remedy="known: center, flip, crop-1 to crop-99")


def view_pixels(
    view: str,
    image: Image.Image,
    sha256: bytes,
    *,
    preprocess: Callable[[Any], torch.Tensor],
    input_size: tuple[int, int],
) -> torch.Tensor:
    """Return the pixels of a view, float32 (3, H, W).

    Args:
        view: `center`, `flip` or `crop-1` to `crop-99`.
        image: RGB.
        sha256: of the image file, which with the view decides the box.
        preprocess: the backbone's.
        input_size: (H, W).
    """
    if match := CROP.fullmatch(view):
        from deltaclip.features.data.pillow import cut

        return preprocess(cut(image, crop_box(image.size, sha256, input_size=input_size, number=int(match[1]))))
    pixels = preprocess(image)
    return pixels.flip(-1) if view == FLIP else pixels


def crop_box(
    size: tuple[int, int], sha256: bytes, *, input_size: tuple[int, int], number: int
) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a crop: of the input's shape, its size and place drawn evenly.

    Args:
        size: (width, height) of the image.
        sha256: of the image file.
        input_size: (H, W).
        number: which crop, from 1.
    """
    state = hashlib.sha256(f"{CROP_SEED} {number} ".encode() + sha256).digest()
    share, across, down = np.random.default_rng(list(state)).random(3)
    fitting = min(size[0] / input_size[1], size[1] / input_size[0]) * (SMALLEST_SHARE + (1 - SMALLEST_SHARE) * share)
    width, height = (
        min(full, max(1, round(fitting * side))) for full, side in zip(size, input_size[::-1], strict=True)
    )
    left, top = (int(free * (extent + 1)) for free, extent in ((across, size[0] - width), (down, size[1] - height)))
    return left, top, left + width, top + height
