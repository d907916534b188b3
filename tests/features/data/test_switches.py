"""What is read does not depend on what other code has set on Pillow, nor on what stands beside the pixels."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import struct
import warnings
import zlib

import numpy as np
import PIL
import pytest
from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin, TiffImagePlugin, features

from deltaclip.features.backbone.pixels import center_crops, single_pixels
from deltaclip.features.data.images import (
    BROKEN,
    UnreadableImage,
    from_memory,
    has_more_frames,
    open_image,
    read_header,
)
from deltaclip.features.data.views import view_pixels
from deltaclip.tests.features.backbone.test_pixels import make_backbone
from deltaclip.tests.features.data.odd_images import animated, chunk, encoded, picture, refused_files, usable_files

NOISE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def interlaced():
    """An interlaced grey PNG of 8 x 8, which Pillow cannot write: seven passes, by the standard."""
    grey = NOISE[:8, :8, 0]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(
        b"\0" + row.tobytes() for top, left, down, across in passes for row in grey[top::down, left::across]
    )
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")


@functools.cache
def whole_files():
    rgb = Image.fromarray(NOISE)
    sixteen = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 200)
    files = {
        "baseline.jpg": encoded(rgb, "JPEG"),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "grey.jpg": encoded(rgb.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "camera.jpg": encoded(rgb, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
        "rgb.png": encoded(rgb),
        "interlaced.png": interlaced(),
        "palette.png": encoded(rgb.quantize(16), transparency=3),
        "sixteen.png": encoded(sixteen),
        "moves.png": animated("PNG"),
        "lossy.webp": encoded(rgb, "WEBP"),
        "lossless.webp": encoded(rgb, "WEBP", lossless=True),
        "moves.webp": animated("WEBP"),
        "still.gif": encoded(rgb.quantize(64), "GIF"),
        "clear.gif": encoded(rgb.quantize(64), "GIF", transparency=3),
        "moves.gif": animated("GIF"),
        "plain.bmp": encoded(rgb, "BMP"),
        "plain.ppm": encoded(rgb, "PPM"),
        "plain.tga": encoded(rgb, "TGA"),
        "packed.tga": encoded(rgb, "TGA", compression="tga_rle"),
        "plain.ico": encoded(rgb, "ICO", sizes=[(32, 32)]),
        "bitmap.ico": encoded(rgb.convert("RGBA"), "ICO", sizes=[(32, 32)], bitmap_format="bmp"),
        "plain.jp2": encoded(rgb, "JPEG2000"),
    }
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files[f"{compression}.tiff"] = encoded(rgb, "TIFF", compression=compression)
    if features.check("avif"):
        files["plain.avif"] = encoded(rgb, "AVIF")
    return files


@functools.cache
def cut_files():
    """Every file whole and cut at several places, and whole with bytes of its middle overwritten."""
    files = {}
    for name, content in whole_files().items():
        files |= {f"{name}, {part} of it": content[: int(len(content) * part)] for part in (0.1, 0.5, 0.9, 1)}
        files[f"{name} without its last bytes"] = content[:-3]
        middle = len(content) // 2
        files[f"{name} with a hole"] = content[:middle] + b"\xa5" * 12 + content[middle + 12 :]
    # All written once: some switches are those of writing too.
    return files | usable_files() | {name: content for name, (content, _) in refused_files().items() if content}


def verdicts():
    """What becomes of each file: its pixels, or the reason why it is refused."""
    found = {}
    for name, content in cut_files().items():
        try:
            found[name] = open_image(content).tobytes()
        except UnreadableImage as reason:
            found[name] = str(reason)
    return found


@pytest.fixture(scope="module")
def as_it_comes():
    found = verdicts()
    assert 60 < sum(isinstance(each, str) for each in found.values()) < len(found) - 60
    halves = [each for name, each in found.items() if "0.5 of it" in name and "moves" not in name]
    assert all(isinstance(each, str) for each in halves)  # half a picture is none, whatever its format
    return found


class OtherPng(PngImagePlugin.PngImageFile):
    """A reader that another library has put into Pillow's place."""

    def _open(self):
        raise AssertionError("another library's reader is asked")


def other_registry(monkeypatch):
    monkeypatch.setattr(Image, "OPEN", {"PNG": (OtherPng, None), "JPEG": (OtherPng, None)})
    monkeypatch.setattr(Image, "ID", ["PNG", "JPEG"])
    monkeypatch.setattr(Image, "preinit", lambda: None)
    monkeypatch.setattr(Image, "init", lambda: None)


def switch(module, name, value):
    return lambda monkeypatch: monkeypatch.setattr(module, name, value)


SWITCHES = {
    "truncated files are welcome": switch(ImageFile, "LOAD_TRUNCATED_IMAGES", True),
    "truncated files are not": switch(ImageFile, "LOAD_TRUNCATED_IMAGES", False),
    "no limit of pixels": switch(Image, "MAX_IMAGE_PIXELS", None),
    "one pixel": switch(Image, "MAX_IMAGE_PIXELS", 1),
    "a warning for each": switch(Image, "MAX_IMAGE_PIXELS", 1200),
    "small blocks": switch(ImageFile, "MAXBLOCK", 64),
    "small safe blocks": switch(ImageFile, "SAFEBLOCK", 8),
    "no text": switch(PngImagePlugin, "MAX_TEXT_CHUNK", 0),
    "no text at all": switch(PngImagePlugin, "MAX_TEXT_MEMORY", 0),
    "gif as rgb": switch(GifImagePlugin, "LOADING_STRATEGY", GifImagePlugin.LoadingStrategy.RGB_ALWAYS),
    "tiff by its library": switch(TiffImagePlugin, "READ_LIBTIFF", True),
    "other readers": other_registry,
}


@pytest.mark.parametrize("name", SWITCHES)
def test_no_switch_of_pillows_changes_what_is_read(as_it_comes, monkeypatch, name):
    SWITCHES[name](monkeypatch)
    found = verdicts()
    assert [name for name in found if found[name] != as_it_comes[name]] == []


def test_no_filter_of_warnings_changes_what_is_read_nor_is_one_set(as_it_comes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        assert verdicts() == as_it_comes
        assert warnings.filters == before


def test_the_switches_stay_as_they_were_and_the_copy_is_nobody_elses():
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == (False, 1024**3 // 4 // 3)
    image = open_image(whole_files()["rgb.png"])
    assert type(image) is PIL.Image.Image


@pytest.mark.parametrize("name", ["truncated files are welcome", "one pixel", "a warning for each"])
def test_what_comes_after_decoding_does_not_depend_on_them_either(monkeypatch, name):
    image = open_image(usable_files()["plain.png"])
    exact, fast = (make_backbone("tiny", decode) for decode in ("exact", "fast"))

    def inputs():
        crop = view_pixels("crop-1", image, bytes(32), preprocess=single_pixels(exact), input_size=(96, 96))
        return [center_crops(exact)(image), center_crops(fast)(image), single_pixels(exact)(image), crop]

    before = inputs()
    SWITCHES[name](monkeypatch)
    assert all((one == other).all() for one, other in zip(before, inputs(), strict=True))


def test_an_opened_picture_is_read_from_its_file(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = whole_files()["baseline.jpg"]
    opened = Image.open(io.BytesIO(whole))
    assert from_memory(opened).tobytes() == open_image(whole).tobytes()
    assert opened.tobytes() == open_image(whole).tobytes()  # and it can still be used
    with pytest.raises(UnreadableImage) as caught:
        from_memory(Image.open(io.BytesIO(whole[: len(whole) // 2])))
    assert str(caught.value).startswith("broken image data (image file is truncated")
    scaled = Image.open(io.BytesIO(whole))
    scaled.draft(None, (14, 10))
    assert from_memory(scaled).size == (14, 10)


def with_pictures_of_plugins():
    """The files of `whole_files`, and HEIC and JPEG XL where their readers are installed."""
    files, rgb = dict(whole_files()), Image.fromarray(NOISE)
    for module, kind, register in (("pillow_heif", "HEIF", "register_heif_opener"), ("pillow_jxl", "JXL", "")):
        if importlib.util.find_spec(module):
            getattr(importlib.import_module(module), register, int)()
            files[kind] = encoded(rgb, kind)
    return files


def test_half_of_an_opened_picture_of_any_format_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    files = with_pictures_of_plugins()
    SWITCHES["truncated files are welcome"](monkeypatch)
    halves, taken = 0, []
    for kind, content in files.items():
        assert from_memory(Image.open(io.BytesIO(content))).tobytes() == open_image(content).tobytes(), kind
        try:
            half = Image.open(io.BytesIO(content[: len(content) // 2]))
        except (*BROKEN, Warning):
            continue
        halves += 1
        with contextlib.suppress(UnreadableImage):
            from_memory(half)
            taken.append(kind)
    assert halves > 10
    assert [kind for kind in taken if not kind.startswith("moves")] == []


def looked(path):
    try:
        return read_header(path, None)
    except UnreadableImage as reason:
        return str(reason)


def test_the_look_at_a_header_is_the_whole_look_stopped_early(tmp_path):
    rng = np.random.default_rng(1)
    files = dict(cut_files())
    for name, content in whole_files().items():
        for number in range(5):
            damaged = np.frombuffer(content, dtype=np.uint8).copy()
            damaged[rng.integers(0, min(len(damaged), 120), 2)] ^= rng.integers(1, 256, 2, dtype=np.uint8)
            files[f"{name}, damage {number}"] = damaged.tobytes()
    files["text"] = b"this is text\n" * 9
    refused_by_header = 0
    for name, content in files.items():
        (tmp_path / "file").write_bytes(content)
        try:
            image, reason = open_image(content), ""
        except UnreadableImage as error:
            reason = str(error)
        found = looked(tmp_path / "file")
        if isinstance(found, str):
            assert found == reason, name
            refused_by_header += 1
            continue
        # What only the whole look refuses are pixels that are not there or not what they should be.
        assert not reason or reason.startswith("broken image data ("), name
        if not reason:
            assert ((found.width, found.height), found.more_frames) == (image.size, has_more_frames(content)), name
    assert refused_by_header > 100


def with_chunks(png, *chunks):
    """The PNG with chunks after its header."""
    return png[:33] + b"".join(chunks) + png[33:]


def with_segments(jpeg, *segments):
    return (
        jpeg[:2]
        + b"".join(b"\xff" + kind + struct.pack(">H", len(body) + 2) + body for kind, body in segments)
        + jpeg[2:]
    )


def beside_png():
    text = b"workflow\0\0" + zlib.compress(b"[1, 2]" * 700_000)
    wrong = chunk(b"tEXt", b"Comment\0fine")[:-4] + b"\0\0\0\0"
    many = [chunk(b"tEXt", b"Comment\0" + b"x" * 990_000)] * 68
    return {
        "packed text of 4 MB": [chunk(b"zTXt", text)],
        "packed international text": [chunk(b"iTXt", b"workflow\0\1\0\0\0" + text[10:])],
        "67 MB of text": many,
        "text packed in an unknown way": [chunk(b"zTXt", b"Comment\0\7abc")],
        "text that does not unpack": [chunk(b"zTXt", b"Comment\0\0abc")],
        "a name without text": [chunk(b"tEXt", b"\xff\xfe"), chunk(b"iTXt", b"XML:com.adobe.xmp\0")],
        "notes of 4 MB on how it lies": [chunk(b"zTXt", b"Raw profile type exif\0\0" + text[10:])],
        "notes that do not unpack": [chunk(b"zTXt", b"Raw profile type exif\0\0abc")],
        "notes that are no numbers": [chunk(b"tEXt", b"Raw profile type exif\0\n\nexif\n\nzz")],
        "a wrong checksum of a comment": [wrong],
        "a broken profile": [chunk(b"iCCP", b"x\0\7abc")],
        "an empty profile": [chunk(b"iCCP")],
        "a profile of 4 MB": [chunk(b"iCCP", b"x\0\0" + text[10:])],
        "short notes": [chunk(b"pHYs", b"\0"), chunk(b"gAMA"), chunk(b"cHRM", b"\0"), chunk(b"sRGB")],
        "broken EXIF": [chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")],
        "EXIF with a wrong checksum": [chunk(b"eXIf", b"MM\0*\0\0\0\x08")[:-4] + b"\0\0\0\0"],
        "a broken animation": [chunk(b"acTL", b"\0"), chunk(b"fcTL", b"\0")],
        "chunks that nobody knows": [chunk(b"caBX", b"\xff" * 70_000)],
    }


@pytest.mark.parametrize("name", beside_png())
def test_a_png_does_not_fail_for_what_stands_beside_its_pixels(name, tmp_path):
    plain = whole_files()["rgb.png"]
    expected = open_image(plain).tobytes()
    end = len(plain) - 12
    (tmp_path / "a.png").write_bytes(with_chunks(plain, *beside_png()[name]))
    assert open_image((tmp_path / "a.png").read_bytes()).tobytes() == expected
    assert read_header(tmp_path / "a.png", None)[:2] == (56, 40)
    behind = plain[:end] + b"".join(beside_png()[name]) + plain[end:]
    assert open_image(behind).tobytes() == expected


def beside_jpeg():
    return {
        "broken EXIF": [(b"\xe1", b"Exif\0\0MM\0*\xff\xff\xff\xff")],
        "EXIF of one byte": [(b"\xe1", b"Exif\0\0M")],
        "a circle of directories": [(b"\xe1", b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\x08")],
        "EXIF with a zero in its dots": [
            (b"\xe1", b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x1a\0\5\0\0\0\1\0\0\0\x1a\0\0\0\0" + bytes(8))
        ],
        "broken XMP": [(b"\xe1", b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta \xff\xfe")],
        "part of a profile": [(b"\xe2", b"ICC_PROFILE\0\3\2abc")],
        "a profile of no parts": [(b"\xe2", b"ICC_PROFILE\0")],
        "broken list of pictures": [(b"\xe2", b"MPF\0MM\0*\xff\xff\xff\xff")],
        "short marks": [(b"\xe0", b""), (b"\xed", b"Photoshop 3.0\x008BIM"), (b"\xfe", b"")],
        "marks cut short": [(b"\xe0", b"JFIF"), (b"\xee", b"Adobe")],
        "a comment of 64 kB": [(b"\xfe", b"x" * 65_000)] * 40,
    }


@pytest.mark.parametrize("name", beside_jpeg())
def test_a_jpeg_does_not_fail_for_what_stands_beside_its_pixels(name, tmp_path):
    plain = whole_files()["baseline.jpg"]
    expected = open_image(plain).tobytes()
    content = with_segments(plain, *beside_jpeg()[name])
    (tmp_path / "a.jpg").write_bytes(content)
    assert open_image(content).tobytes() == expected
    assert read_header(tmp_path / "a.jpg", None)[:2] == (56, 40)


# What decodes JPEG 2000 takes bytes behind the end for a part of it.
@pytest.mark.parametrize("name", sorted(whole_files().keys() - {"plain.jp2"}))
def test_bytes_behind_the_end_are_no_part_of_a_picture(name):
    content = whole_files()[name]
    for rubbish in (b"\0" * 5000, b"PK\3\4 an archive that somebody hid here", content[: len(content) // 2]):
        assert open_image(content + rubbish).tobytes() == open_image(content).tobytes()


def test_broken_second_picture_of_a_camera():
    content = whole_files()["camera.jpg"]
    second = content.index(b"\xff\xd8\xff", 10)
    expected = open_image(content).tobytes()
    assert open_image(content[:second]).tobytes() == expected
    assert open_image(content[:second] + b"\0" * 90).tobytes() == expected


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"tRNS", b"IDAT"])
def test_a_wrong_checksum_of_what_the_picture_is_made_of_is_damage(kind):
    content = bytearray(whole_files()["palette.png"])
    start = content.index(kind) - 4
    end = start + 8 + int.from_bytes(content[start : start + 4])
    content[end] ^= 1
    with pytest.raises(UnreadableImage) as caught:
        open_image(bytes(content))
    assert str(caught.value) == f"broken image data (wrong checksum of PNG chunk {kind.decode()})"


def test_how_a_picture_lies_is_still_read_where_programs_write_it():
    upright = open_image(usable_files()["plain.png"])
    turned = encoded(Image.fromarray(np.ascontiguousarray(picture().swapaxes(0, 1)[::-1])))  # for orientation 6
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    exif = b"\nexif\n      32\n" + (b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0").hex().encode()
    for note in (
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(exif)),
        chunk(b"tEXt", b"Raw profile type exif\0" + exif),
    ):
        assert open_image(with_chunks(turned, note)).tobytes() == upright.tobytes()
