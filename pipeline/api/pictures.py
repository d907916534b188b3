"""One image of a caller, in whatever form people hold it, as what the decoders take.

Knows arrays, tensors, files in memory and the rows of other libraries. Must not know prompts, heads or backbones.

Shapes: H and W pixels, C channels: 1 grey, 3 RGB, 4 RGBA.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.features.data.manifest import ALIASES

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    Picture = Path | bytes | Image

CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
# Half a level of 8 bits is 0.002: what rounding leaves above 1 or below 0 changes no pixel.
ROUNDING = 1e-3
OVERSHOOT = 0.25  # bicubic and Lanczos resizing leave [0, 1] by less


def is_one_image(given: Any) -> bool:
    """Tell one image from a list, an array or a batch of them."""
    if isinstance(given, (str, os.PathLike, bytes, bytearray, memoryview)) or _is_pillow(given):
        return True
    if as_row(given) is not None:
        return True
    if is_array(given):
        return given.ndim in {2, 3} and not _is_text_like(given)
    return _is_file(given)


def as_row(given: Any) -> Mapping[Any, Any] | None:
    """Return a row of a table as a mapping: of `datasets`, or of pandas by `iloc` or `itertuples`; None for others."""
    if hasattr(given, "_asdict"):
        given = given._asdict()
    elif hasattr(given, "iloc") and hasattr(given, "to_dict") and not hasattr(given, "columns"):
        given = {} if given.index.dtype.kind in "iufM" else given.to_dict()
        return given if image_column(given) else None  # else it is a column
    return given if isinstance(given, Mapping) else None


def is_array(given: Any) -> bool:
    """Tell arrays and tensors of any library from lists and columns of tables."""
    return (
        hasattr(given, "__array__")
        and hasattr(given, "ndim")
        and hasattr(given, "shape")
        and not hasattr(given, "iloc")
    )


def as_picture(given: Any, place: str) -> Picture:
    """Return an image as a path, the bytes of a file, or a Pillow image.

    Args:
        given: a path; bytes of an image file, or an open one; a Pillow image of any mode; pixels as `from_pixels` takes
            them; or a row with one of these, such as `{"bytes": ..., "path": ...}` or `{"image": ..., ...}`.
        place: its name for messages.

    Raises:
        ValueError: pixels of another shape, type or range.
        TypeError: no image.
    """
    given = plain(given)
    if (row := as_row(given)) is not None:
        return as_picture(_of_row(row, place), place)
    if isinstance(given, (str, os.PathLike)):
        return given if isinstance(given, Path) else Path(given)  # an address stays one
    if _is_file(given) and not _is_pillow(given):
        given = given.read()
    if isinstance(given, (bytes, bytearray, memoryview)):
        return bytes(given)
    if _is_pillow(given):
        picture: Image = given
        return picture
    if is_array(given) and not _is_text_like(given):
        return from_pixels(as_numpy(given), place)
    raise TypeError(f"{place} is {named(given)}: give a path, a PIL image, the bytes of a file, or pixels")


def from_pixels(pixels: NDArray[Any], place: str) -> Image:
    """Return pixels as a Pillow image of 8 bits.

    Args:
        pixels: (H, W), (H, W, C) or (C, H, W); uint8, or floats in [0, 1]. The axis of 1, 3 or 4 entries is that of the
            channels; where the first and the last both could be, 3 or 4 goes before 1, and any other such array is
            refused. (1, C, H, W) and (1, H, W, C) are their one image.
        place: its name for messages.

    Raises:
        ValueError: another shape, type or range, or pixels that are not finite.
    """
    from PIL import Image

    levels_HWC = _levels(_channels_last(pixels, place), place)
    mode = CHANNELS[levels_HWC.shape[2]]
    return Image.fromarray(np.ascontiguousarray(levels_HWC[:, :, 0] if mode == "L" else levels_HWC))


def as_numpy(array: Any) -> NDArray[Any]:
    """Return an array or tensor of any library, on any device, as a numpy array."""
    if hasattr(array, "detach"):  # torch
        array = array.detach().cpu()
        # numpy has no bfloat16.
        array = array.float() if array.is_floating_point() else array
    return np.asarray(array)


def plain(value: Any) -> Any:
    """Return a cell of a pyarrow column as Python's own value; anything else as it is."""
    return value.as_py() if hasattr(value, "as_py") else value


def named(value: Any) -> str:
    """Say what a value is, for messages."""
    if is_array(value):
        return f"an array of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"of type {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def image_column(row: Mapping[Any, Any]) -> str | None:
    """Return the name under which a row, or a batch of rows by column, holds its image, None where it has none.

    `datasets` stores an image as its bytes and the path that they came from; either may be None.
    """
    return next((name for name in ("bytes", *ALIASES["image"]) if row.get(name) is not None), None)


def _of_row(row: Mapping[Any, Any], place: str) -> Any:
    column = image_column(row)
    if column is None:
        known = ", ".join(str(key) for key in row) or "nothing"
        raise TypeError(f"{place} is a row without an image, it has {known}: give the image itself")
    return row[column]


def _channels_last(pixels: NDArray[Any], place: str) -> NDArray[Any]:
    one = pixels[0] if pixels.ndim == 4 and len(pixels) == 1 else pixels
    if one.ndim == 2:
        one = one[:, :, None]
        first, last = 0, 1
    else:
        first, last = (one.shape[axis] if one.ndim == 3 and one.shape[axis] in CHANNELS else 0 for axis in (0, -1))
    if not (first or last) or 0 in one.shape:
        raise ValueError(f"{place} is {named(pixels)}: pixels are (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4")
    if (first > 1 and last > 1) or first == last:
        message = f"{place} is {named(pixels)}: its channels may stand first or last; give a PIL image"
        raise ValueError(message)
    return one if last > first else np.moveaxis(one, 0, -1)


def _levels(pixels: NDArray[Any], place: str) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind != "f":
        raise ValueError(f"{place} has pixels of {pixels.dtype}: give uint8, or floats from 0 to 1")
    low, high = float(pixels.min()), float(pixels.max())  # NaN where there is one
    if not (np.isfinite(low) and np.isfinite(high)):
        row, column, _ = (int(axis[0]) for axis in np.nonzero(~np.isfinite(pixels)))
        raise ValueError(f"{place} has pixels that are NaN or infinite, the first in row {row}, column {column}")
    if low < -ROUNDING or high > 1 + ROUNDING:
        message = (
            f"{place} has float pixels from {low:.4g} to {high:.4g}, outside 0 to 1: {remedy_for_range(low, high)}"
        )
        raise ValueError(message)
    levels: NDArray[np.uint8] = (pixels.astype(np.float64) * 255).round().clip(0, 255).astype(np.uint8)
    return levels


def remedy_for_range(low: float, high: float) -> str:
    """Say what to do about float pixels from `low` to `high`, beyond 0 or 1."""
    if low > -OVERSHOOT and high < 1 + OVERSHOOT:
        return "clip what resizing has overshot"
    if low >= -1 - ROUNDING and high <= 1 + ROUNDING:
        return "give (x + 1) / 2"
    if low >= 0 and high <= 255:
        return "give x / 255"
    return "give pixels as they were before they were normalised"


def _is_pillow(value: Any) -> bool:
    from PIL import Image

    return isinstance(value, Image.Image)


def _is_file(value: Any) -> bool:
    return callable(getattr(value, "read", None))


def _is_text_like(array: Any) -> bool:
    return getattr(array.dtype, "kind", "") in {"O", "U", "S", "T"}
