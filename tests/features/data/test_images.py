"""Odd image files as people have them: right, or refused with the reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from deltaclip.features.data.content import CHUNK, hash_images
from deltaclip.features.data.images import (
    MAX_PIXELS,
    UnreadableFile,
    UnreadableImage,
    open_image,
    read_image_bytes,
)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(content):
    image = open_image(content)
    assert image.mode == "RGB"
    return np.asarray(image)


def picture(width=40, height=30):
    """A smooth picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1).astype(np.uint8)


def refused(content):
    with pytest.raises(UnreadableImage) as caught:
        open_image(content)
    return str(caught.value)


def png_header(width, height):
    """A PNG that says how large it is and holds nothing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + body + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_rgb_is_taken_as_it_is(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(picture()), kind, **options)), picture())


def test_jpeg_is_what_pillow_decodes():
    content = encoded(Image.fromarray(picture()), "JPEG", quality=90)
    np.testing.assert_array_equal(pixels(content), np.asarray(Image.open(io.BytesIO(content))))
    # Lossy, yet of a smooth picture: a few levels of 255.
    assert np.abs(pixels(content).astype(int) - picture()).max() < 12


def test_cmyk_jpeg():
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(pixels(content).astype(int) - [255, 0, 0]).max() < 12  # no cyan, all magenta and yellow: red


def test_16_bit_png_is_scaled_not_clipped():
    levels = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    expected = np.array([[0, 1, 128, 255]])  # level * 255 / 65535, rounded
    content = encoded(Image.fromarray(levels))
    assert Image.open(io.BytesIO(content)).mode == "I;16"
    np.testing.assert_array_equal(pixels(content), np.repeat(expected[..., None], 3, axis=2))


def test_16_bit_tiff_and_ppm_are_scaled_too():
    levels = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    for kind in ("TIFF", "PPM"):
        np.testing.assert_array_equal(pixels(encoded(Image.fromarray(levels), kind))[0, :, 0], [0, 1, 128, 255])


def test_pixels_without_a_known_range_are_refused():
    grey = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    assert refused(encoded(Image.fromarray(grey), "TIFF")) == "float pixels have no known range"
    wide = (grey * 2**31).astype(np.int64).clip(0, 2**31 - 1).astype(np.int32)
    assert refused(encoded(Image.fromarray(wide), "TIFF")) == "32-bit pixels have no known range"


def test_grey_one_bit_and_grey_with_alpha():
    np.testing.assert_array_equal(pixels(encoded(Image.new("L", (2, 2), 77))), np.full((2, 2, 3), 77))
    np.testing.assert_array_equal(pixels(encoded(Image.new("1", (2, 2), 1))), np.full((2, 2, 3), 255))
    np.testing.assert_array_equal(pixels(encoded(Image.new("LA", (2, 2), (0, 0)))), np.full((2, 2, 3), 255))


def test_transparency_lies_over_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0] = [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)]
    found = pixels(encoded(Image.fromarray(rgba)))
    np.testing.assert_array_equal(found[0, :2], [(255, 0, 0), (255, 255, 255)])
    assert np.abs(found[0, 2].astype(int) - 127).max() <= 1  # half black over white


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putdata([0, 1])
    plain = pixels(encoded(image))
    np.testing.assert_array_equal(plain[0], [(10, 20, 30), (200, 0, 0)])
    found = pixels(encoded(image, transparency=1))
    np.testing.assert_array_equal(found[0], [(10, 20, 30), (255, 255, 255)])


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(pixels(content).astype(int) - [255, 0, 0]).max() < 8, kind


def test_exif_orientation():
    upright = picture()
    # Orientation 6: the camera lay on its side; the file is turned by 90 degrees against the clock.
    turned = Image.fromarray(np.rot90(upright))
    exif = Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(pixels(encoded(turned, exif=exif)), upright)


def test_smallest_and_longest():
    np.testing.assert_array_equal(pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))), [[[1, 2, 3]]])
    assert pixels(encoded(Image.new("RGB", (1000, 10)))).shape == (10, 1000, 3)
    assert refused(encoded(Image.new("RGB", (1001, 10)))) == "1001 x 10 is a strip longer than 100:1"
    assert refused(encoded(Image.new("RGB", (10, 1001)))) == "10 x 1001 is a strip longer than 100:1"
    assert refused(encoded(Image.new("L", (30_000, 10)))) == "30000 x 10 is a strip longer than 100:1"


def test_bombs_are_refused_by_their_header():
    assert refused(png_header(10_001, 10_000)) == "10001 x 10000 is over 100 million pixels"
    assert refused(png_header(2**31 - 1, 2**31 - 1)) in {
        f"{2**31 - 1} x {2**31 - 1} is over 100 million pixels",
        "over 100 million pixels",
    }
    # Exactly at the limit the size is no reason; that there is no content is.
    assert MAX_PIXELS == 10_000 * 10_000
    assert "million" not in refused(png_header(10_000, 10_000))


def test_a_picture_between_pillows_limit_and_ours_is_no_warning():
    # Pillow warns from 89 million pixels on; warnings are errors in these tests.
    assert open_image(encoded(Image.new("1", (9_500, 9_500)))).size == (9_500, 9_500)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    assert refused(content[: len(content) // 2]).startswith("broken image data (")
    assert refused(content[:20]) in {"not an image in a known format", "broken image data (Truncated File Read)"}


def test_broken_bytes_never_escape_as_another_error():
    rng = np.random.default_rng(1)
    contents = [
        encoded(Image.fromarray(picture()), kind)
        for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "JPEG2000", "AVIF", "TGA", "PPM")
    ]
    refusals = 0
    for content in contents:
        for _ in range(60):
            damaged = np.frombuffer(content, dtype=np.uint8).copy()
            damaged[rng.integers(0, len(damaged), 6)] ^= rng.integers(1, 256, 6, dtype=np.uint8)
            try:
                assert open_image(damaged.tobytes()).mode == "RGB"
            except UnreadableImage as reason:
                refusals += bool(str(reason))
    assert refusals > 100


def test_not_images(tmp_path):
    assert refused(b"this is text, not a JPEG\n" * 9) == "not an image in a known format"
    assert refused(b"<html></html>") == "not an image in a known format"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    assert refused(postscript) == "not an image in a known format"  # Pillow would start Ghostscript
    (tmp_path / "empty.png").touch()
    with pytest.raises(UnreadableImage) as caught:
        read_image_bytes(tmp_path / "empty.png", tmp_path)
    assert str(caught.value) == "empty file"


def test_reading_stays_in_the_root(tmp_path):
    root, secret = tmp_path / "root", tmp_path / "secret.png"
    root.mkdir()
    secret.write_bytes(b"x")
    (root / "fine.png").write_bytes(b"y")
    (root / "inner.png").symlink_to("fine.png")
    (root / "link.png").symlink_to(secret)
    (root / "folder").symlink_to(tmp_path)
    outside = "links to a file outside the image root"
    for name, reason in {
        "link.png": outside,
        "folder/secret.png": outside,
        "none.png": "no such file",
        ".": "Is a directory",
        f"{'a' * 300}.png": "File name too long",
    }.items():
        with pytest.raises(UnreadableImage) as caught:
            read_image_bytes(root / name, root)
        assert str(caught.value) == reason, name
    assert read_image_bytes(root / "inner.png", root) == b"y"
    assert read_image_bytes(root / "link.png", None) == b"x"
    (tmp_path / "also").symlink_to(root)  # a root that is a link itself
    assert read_image_bytes(tmp_path / "also" / "fine.png", tmp_path / "also") == b"y"


@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_hashes_come_in_order(tmp_path, count):
    import hashlib

    paths = [tmp_path / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        if number % 7 != 3:
            path.write_bytes(str(number).encode())
    found = hash_images(paths, tmp_path)
    assert [content.sha256 for content in found] == [
        None if number % 7 == 3 else hashlib.sha256(str(number).encode()).digest() for number in range(count)
    ]
    assert {content.reason for content in found} <= {"", "no such file"}


def test_a_file_that_cannot_be_read_is_told_from_one_that_is_no_image(tmp_path):
    with pytest.raises(UnreadableFile):
        read_image_bytes(tmp_path / "none.png", tmp_path)
    with pytest.raises(UnreadableImage) as caught:
        open_image(b"no image")
    assert not isinstance(caught.value, UnreadableFile)
