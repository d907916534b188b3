"""Ways to decode: who sees which pixels, broken files included."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from deltaclip.features.data.decoding import open_decoded
from deltaclip.features.data.images import UnreadableImage, open_image

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((90, 61))


def saved(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.mark.parametrize(
    ("content", "drafted"),
    [
        (saved(PICTURE), (45, 31)),
        (saved(PICTURE, progressive=True, quality=30), (45, 31)),
        (saved(PICTURE.convert("L")), (45, 31)),
        (saved(PICTURE.convert("CMYK")), (45, 31)),
        (saved(PICTURE, exif=exif(6)), (31, 45)),
        (saved(PICTURE, "PNG"), (90, 61)),
        (saved(PICTURE, "WEBP"), (90, 61)),
    ],
)
def test_ways(content, drafted):
    exact = open_image(content)
    for decode in ("exact", "fast"):
        found = open_decoded(content, decode=decode, short_side=30)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(exact))
    found = open_decoded(content, decode="draft", short_side=30)
    assert (found.size, found.mode) == (drafted, "RGB")
    assert open_decoded(content, decode="draft", short_side=31).size == exact.size  # 61 / 2 would be too little


@pytest.mark.parametrize("cut", [3, 200, 600])
def test_broken_files_have_one_reason_whatever_the_way(cut):
    content = saved(PICTURE)[:-cut]
    with pytest.raises(UnreadableImage) as exact:
        open_decoded(content, decode="exact", short_side=30)
    with pytest.raises(UnreadableImage) as draft:
        open_decoded(content, decode="draft", short_side=30)
    assert str(exact.value).partition("(")[0] == str(draft.value).partition("(")[0]
