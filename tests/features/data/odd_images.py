"""Files of every odd kind that people have, each written here, with what must become of it."""

from __future__ import annotations

import io
import re
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width=40, height=30):
    """A smooth picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1).astype(np.uint8)


def chunk(kind, content=b""):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, rows, *, depth, colour, extra=()):
    """A PNG from packed rows, by the standard alone: what Pillow cannot write."""
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))]
    parts += [chunk(*pair) for pair in extra]
    parts += [chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), chunk(b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width, height):
    """A PNG that says how large it is and holds nothing."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT")


def animated(kind, colours=("red", "blue", "lime")):
    frames = [Image.new("RGB", (24, 18), colour) for colour in colours]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def without_adobe(jpeg):
    """The JPEG without the marker by which Adobe's programs say how they wrote it."""
    place = jpeg.index(b"\xff\xee\x00\x0eAdobe")
    return jpeg[:place] + jpeg[place + 16 :]


def as_ycck(jpeg):
    """The four-channel JPEG said to hold YCCK: the marker's last byte."""
    place = jpeg.index(b"\xff\xee\x00\x0eAdobe")
    return jpeg[: place + 15] + b"\x02" + jpeg[place + 16 :]


def turned(upright, orientation):
    """The file of a picture that a camera of this orientation would write, from the definition of the EXIF tag."""
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[::-1],  # row 0 is the right side, column 0 the top
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: a.swapaxes(0, 1)[:, ::-1],  # row 0 is the left side, column 0 the bottom
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)


def profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def usable_files():
    """Name to content of files that are images."""
    rgb = Image.fromarray(picture())
    noise = np.random.default_rng(0).integers(0, 65536, (20, 20, 3), dtype=np.uint16)
    cmyk = encoded(Image.new("CMYK", (24, 18), (10, 200, 30, 40)), "JPEG", quality=95)
    palette = rgb.quantize(16)
    return {
        "plain.png": encoded(rgb),
        "a photo, with spaces.jpg": encoded(rgb, "JPEG"),
        "картина 画 é.webp": encoded(rgb, "WEBP"),
        "png_named.jpg": encoded(rgb.rotate(90)),
        "cmyk.jpg": without_adobe(cmyk),
        "cmyk_adobe.jpg": cmyk,
        "grey16.png": encoded(Image.fromarray(noise[..., 0])),
        "rgb16.png": png(20, [row.astype(">u2").tobytes() for row in noise], depth=16, colour=2),
        "palette.png": encoded(palette, transparency=3),
        "la.png": encoded(Image.new("LA", (24, 18), (9, 99))),
        "rgba.png": encoded(Image.new("RGBA", (24, 18), (9, 8, 7, 99))),
        "one_bit.png": encoded(rgb.convert("1")),
        "moves.gif": animated("GIF"),
        "moves.webp": animated("WEBP"),
        "moves.png": animated("PNG"),
        "pages.tiff": animated("TIFF"),
        "still.gif": animated("GIF", ["red"]),
        **{f"exif{number}.png": turned(picture(), number) for number in range(1, 9)},
        "one_pixel.png": encoded(Image.new("RGB", (1, 1), "red")),
        "edge_strip.png": encoded(Image.new("RGB", (1000, 10), "red")),
        "profile.png": encoded(rgb, icc_profile=profile()),
    }


def refused_files():
    """Name to content and reason (as `without_count` gives it) of files that are none, or none that can be used."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    jpeg = encoded(noise, "JPEG")
    hidden = (b"tRNS", struct.pack(">3H", 1, 2, 3))
    return {
        "truncated.jpg": (
            jpeg[: len(jpeg) // 2],
            "broken image data (image file is truncated (N bytes not processed))",
        ),
        "empty.png": (b"", "empty file"),
        "text.jpg": (b"this is text\n" * 9, "not an image in a known format"),
        "strip.png": (encoded(Image.new("L", (30_000, 10))), "30000 x 10 is a strip longer than 100:1"),
        "tall.png": (encoded(Image.new("L", (10, 30_000))), "10 x 30000 is a strip longer than 100:1"),
        "bomb.png": (png_header(60_000, 60_000), "60000 x 60000 is over 100 million pixels"),
        "large.png": (png_header(10_001, 10_000), "10001 x 10000 is over 100 million pixels"),
        "float.tiff": (
            encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
            "float pixels have no known range",
        ),
        "hidden16.png": (
            png(2, [bytes(12)], depth=16, colour=2, extra=[hidden]),
            "a transparent colour among 16-bit RGB pixels cannot be told from its neighbours",
        ),
    }


def without_count(reason):
    """The reason without the number of bytes that a decoder was left with, which is the decoder's own affair."""
    return re.sub(r"\d+ bytes", "N bytes", reason)


def noise_pictures(folder, count, *, suffix="png"):
    """Write pictures of noise, each of its own content and size, and return their paths."""
    paths = []
    for number in range(count):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 256, (*random.integers(12, 48, 2).tolist(), 3), dtype=np.uint8)
        paths.append(folder / f"p{number}.{suffix}")
        Image.fromarray(pixels).save(paths[-1])
    return paths
