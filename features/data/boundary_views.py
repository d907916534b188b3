"""The pictures of an image that a boundary file can hold: as it is, mirrored, or one of some crops.

Where activations are kept, augmentation has to be a fixed set: a crop is drawn once, from a seed and the image's own
hash, so that it is the same in every run and for every order of the rows. Knows images. Must not know towers or caches.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.data.views import CENTER, RECIPES

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from PIL import Image

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
