"""Ways from an image file to a model's input: open_clip's own pixels, or nearly those sooner.

Knows which steps each way replaces. Must not know models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image

# `exact`: Pillow decodes and resizes, as open_clip does. `fast`: torchvision resizes, in 8 bits. `draft`: JPEG files
# are decoded at a fraction of their size. `gpu`: JPEG files are decoded and resized on a GPU, all that it is not given
# as by `fast`. Part of a cache's identity, all but `exact`; docs/speed.md has their effects.
Decode = Literal["exact", "fast", "draft", "gpu"]


def on_host(decode: Decode) -> Decode:
    """Return the way that processors take where a cache was decoded in this one."""
    return "fast" if decode == "gpu" else decode


def open_decoded(content: bytes, *, decode: Decode, short_side: int, max_pixels: int | None = None) -> Image.Image:
    """Decode an image to upright RGB.

    Args:
        content: bytes of the file.
        decode: `draft` reads a JPEG at the smallest of 1, 1/2, 1/4, 1/8 of its size that keeps `short_side`; the others
            read all of it, with the same decoder.
        short_side: of what the model is given.
        max_pixels: of the file; None takes the limit of `images`.

    Raises:
        UnreadableImage: as `images.open_image`.
    """
    from deltaclip.features.data.images import MAX_PIXELS, open_image

    return open_image(
        content,
        short_side=short_side if decode == "draft" else None,
        max_pixels=MAX_PIXELS if max_pixels is None else max_pixels,
    )
