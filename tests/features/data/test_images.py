"""Odd image files as people have them: right, or refused with the reason."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deltaclip.features.data.images import (
    CHUNK,
    MAX_PIXELS,
    UnreadableFile,
    UnreadableImage,
    from_memory,
    has_more_frames,
    hash_images,
    open_image,
    read_header,
    read_image_bytes,
)
from deltaclip.tests.features.data.odd_images import (
    animated,
    as_ycck,
    chunk,
    encoded,
    picture,
    png,
    png_header,
    profile,
    refused_files,
    turned,
    usable_files,
    without_adobe,
    without_count,
)


def pixels(content):
    image = open_image(content)
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(content):
    with pytest.raises(UnreadableImage) as caught:
        open_image(content)
    return str(caught.value)


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


def test_cmyk_jpeg_is_inverted_with_adobes_marker_and_without():
    inks = np.stack([picture()[..., 0], picture()[..., 1], picture()[..., 2], picture()[..., 0] // 3], axis=-1)
    jpeg = encoded(Image.frombytes("CMYK", (40, 30), inks.tobytes()), "JPEG", quality=100, subsampling=0)
    light = 255.0 - inks
    expected = light[..., :3] * light[..., 3:] / 255
    for content in (jpeg, without_adobe(jpeg)):
        assert np.abs(pixels(content) - expected).max() < 8  # lossy


def test_ycck_jpeg():
    # Stored are luma, two chromas and inverted black; Pillow writes CMYK inverted, so the complement goes in.
    luma = np.asarray(Image.fromarray(picture()).convert("YCbCr"))
    stored = np.concatenate([luma, np.full((30, 40, 1), 255, np.uint8)], axis=-1)
    jpeg = encoded(Image.frombytes("CMYK", (40, 30), (255 - stored).tobytes()), "JPEG", quality=100, subsampling=0)
    assert np.abs(pixels(as_ycck(jpeg)).astype(int) - (255 - picture().astype(int))).max() < 8


def test_16_bit_png_is_scaled_not_clipped():
    levels = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    expected = np.array([[0, 1, 128, 255]])  # level * 255 / 65535, rounded
    content = encoded(Image.fromarray(levels))
    assert Image.open(io.BytesIO(content)).mode == "I;16"
    np.testing.assert_array_equal(pixels(content), np.repeat(expected[..., None], 3, axis=2))


def test_16_bit_rgb_and_alpha():
    levels = np.random.default_rng(2).integers(0, 65536, (16, 16, 4), dtype=np.uint16)
    levels[..., 3] = 65535
    levels[0, 0], levels[0, 1], levels[0, 2] = (0, 65535, 255, 65535), (256, 257, 65280, 65535), (1, 2, 3, 0)
    expected = np.round(levels[..., :3] / 65535 * 255)
    expected[0, 2] = 255  # transparent, over white
    for channels, colour in ((4, 6), (3, 2)):
        part = np.ascontiguousarray(levels[..., :channels]).astype(">u2")
        found = pixels(png(16, [row.tobytes() for row in part], depth=16, colour=colour)).astype(int)
        wrong = np.abs(found - (expected if channels == 4 else np.round(levels[..., :3] / 65535 * 255)))
        assert wrong.max() <= 1  # the upper byte instead of a rounded quotient
    grey = np.array([[(0, 65535), (65535, 65535), (7, 0)]], dtype=">u2")
    np.testing.assert_array_equal(pixels(png(3, [grey.tobytes()], depth=16, colour=4))[0, :, 0], [0, 255, 255])


@pytest.mark.parametrize(
    ("depth", "row", "hidden", "expected"),
    [
        (1, [0b01000000], 0, [255, 255]),
        (1, [0b01000000], 1, [0, 255]),
        (2, [0b00011011], 1, [0, 255, 170, 255]),
        (4, [0x05, 0xAF], 5, [0, 255, 170, 255]),
        (8, [7, 8], 7, [255, 8]),
        (16, [0, 0, 0x80, 0, 0x80, 1], 0x8000, [0, 255, 128]),
    ],
)
def test_a_transparent_grey_of_every_depth(depth, row, hidden, expected):
    extra = [(b"tRNS", struct.pack(">H", hidden))]
    found = pixels(png(len(expected), [bytes(row)], depth=depth, colour=0, extra=extra))
    np.testing.assert_array_equal(found, np.repeat(np.array(expected)[None, :, None], 3, axis=2))


def test_a_transparent_colour():
    extra = [(b"tRNS", struct.pack(">3H", 7, 8, 9))]
    found = pixels(png(2, [bytes([7, 8, 9, 7, 8, 10])], depth=8, colour=2, extra=extra))
    np.testing.assert_array_equal(found, [[(255, 255, 255), (7, 8, 10)]])


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


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_first_frame_of_an_animation_and_that_there_are_more(kind):
    content = animated(kind)
    assert np.abs(pixels(content).astype(int) - [255, 0, 0]).max() < 8
    assert has_more_frames(content)
    assert not has_more_frames(animated(kind, ["red"]))


def test_what_has_no_more_frames():
    camera = encoded(Image.new("RGB", (8, 8)), "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    icon = encoded(Image.new("RGB", (32, 32)), "ICO", sizes=[(16, 16), (32, 32)])
    for content in (camera, icon, encoded(Image.new("RGB", (8, 8)), "WEBP"), encoded(Image.new("RGB", (8, 8)), "JPEG")):
        assert not has_more_frames(content)
    # Whatever is cut off anywhere is no error: its reason is told where it is decoded.
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        content = animated(kind)
        found = {has_more_frames(content[:end]) for end in range(0, len(content), 3)}
        assert found <= {True, False}
    assert not has_more_frames(b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0))


def test_a_colour_profile_changes_nothing():
    plain = Image.fromarray(picture())
    np.testing.assert_array_equal(pixels(encoded(plain, icc_profile=profile())), picture())
    np.testing.assert_array_equal(pixels(encoded(plain, icc_profile=b"broken")), picture())


def test_an_icon_that_holds_more_than_it_says():
    inside = encoded(Image.new("L", (1500, 10)))
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22) + inside
    assert "1500 x 10 is a strip longer than 100:1" in refused(icon)


@pytest.mark.parametrize("name", usable_files())
def test_every_usable_file_is_read(name):
    assert open_image(usable_files()[name]).mode == "RGB"


@pytest.mark.parametrize("name", sorted(refused_files().keys() - {"empty.png"}))
def test_every_other_file_is_refused_by_its_reason(name):
    content, reason = refused_files()[name]
    assert without_count(refused(content)) == reason


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    np.testing.assert_array_equal(pixels(turned(picture(), orientation)), picture())


@pytest.mark.parametrize(
    "notes", [b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abcd"]
)
def test_damaged_exif_leaves_the_picture_as_it_lies(notes):
    content = encoded(Image.fromarray(picture()))
    after_header = len(png_header(1, 1)) - len(chunk(b"IDAT"))
    with_notes = content[:after_header] + chunk(b"eXIf", notes) + content[after_header:]
    np.testing.assert_array_equal(pixels(with_notes), picture())


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_does_not_exist(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(picture()), exif=exif)), picture())


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
    assert refused(content[:20]).startswith("broken image data (")


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


@pytest.mark.parametrize("look", [read_image_bytes, read_header])
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, look):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "round.png").symlink_to("about.png")
    (tmp_path / "about.png").symlink_to("round.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text").touch()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.png"))
        for root in (None, tmp_path):
            for name, reason in {
                "pipe.png": "a pipe, not a file",
                "socket.png": "a socket, not a file",
                "round.png": "Too many levels of symbolic links",
                "gone.png": "no such file",
                "empty.png": "empty file",
                "text/a.png": "Not a directory",
                "a\0.png": "not the name of a file",
                "a" * 300: "File name too long",
            }.items():
                with pytest.raises(UnreadableFile) as caught:
                    look(tmp_path / name, root)
                assert str(caught.value) == reason, name
    with pytest.raises(UnreadableFile, match=r"^a device, not a file$"):
        look(Path("/dev/zero"), None)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (MemoryError(), UnreadableFile, "not enough memory to decode it"),
        (OSError(5, "Input/output error"), UnreadableFile, "Input/output error"),
        (zlib.error("x"), UnreadableImage, "broken image data (x)"),
        (RecursionError("deep"), UnreadableImage, "broken image data (deep)"),
        (OverflowError(), UnreadableImage, "broken image data (OverflowError)"),
    ],
)
def test_errors_of_every_layer_are_reasons(error, kind, reason):
    class Failing(Image.Image):
        """A picture in memory whose pixels cannot be had."""

        def load(self):
            raise error

    picture_ = Failing()
    picture_._mode, picture_._size = "RGB", (8, 8)
    with pytest.raises(UnreadableImage) as caught:
        from_memory(picture_)
    assert (type(caught.value), str(caught.value)) == (kind, reason)


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
