"""Small copies of images, to stand in a page. Knows Pillow; must not know pages."""

from __future__ import annotations

import io

from PIL import Image

from deltaclip.features.data.images import open_image

WEBP_QUALITY = 72  # 4 to 8 kB at 224 pixels; artefacts of the images themselves stay visible


def thumbnail(content: bytes, side_pixels: int) -> bytes:
    """Return an image file as WebP that fits a square, larger images made smaller and smaller ones left as they are.

    Args:
        content: an image file.
        side_pixels: side of the square, at least 1.

    Raises:
        UnreadableImage: see `open_image`.
    """
    image = open_image(content)
    image.thumbnail((side_pixels, side_pixels), Image.Resampling.LANCZOS)
    small = io.BytesIO()
    image.save(small, "WEBP", quality=WEBP_QUALITY)
    return small.getvalue()
