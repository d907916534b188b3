"""JPEG files that another decoder may be given: whole and plain ones alone, and none that Pillow would refuse."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deltaclip.features.data.images import decode_plain, open_image, open_undecoded
from deltaclip.features.data.jpeg import PlainJpeg, plain_stream
from deltaclip.features.data.sources import UnreadableImage
from deltaclip.tests.features.data.odd_images import encoded, picture, profile

ORIENTATION = 0x0112


def noisy(width=72, height=50):
    noise = np.random.default_rng(0).integers(-40, 40, (height, width, 3))
    return Image.fromarray((picture(width, height) + noise).clip(0, 255).astype(np.uint8))


def jpeg(image=None, **options):
    return encoded(image or noisy(), "JPEG", **options)


def exif(orientation):
    notes = Image.Exif()
    notes[ORIENTATION] = orientation
    return notes


def place_of(content, kind):
    """Where a segment begins; no other is looked into."""
    place = 2
    while content[place + 1] != kind:
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return place


def changed(content, place, value):
    return content[:place] + bytes([value]) + content[place + 1 :]


@functools.cache
def plain_files():
    restarts = jpeg(restart_marker_blocks=3)
    return {
        "4:2:0": jpeg(),
        "4:2:2": jpeg(subsampling=1),
        "4:4:4": jpeg(subsampling=0, quality=95),
        "grey": jpeg(noisy().convert("L")),
        "own codes": jpeg(optimize=True),
        "restarts": restarts,
        "a row at a time": jpeg(restart_marker_rows=1),
        "notes": jpeg(comment=b"\xff\xd9\xff\xda", icc_profile=profile()),
        "lies on its side": jpeg(exif=exif(6)),
        "bytes behind the end": jpeg() + b"\xff\xd8 another \xff\xd9",
    }


@functools.cache
def other_files():
    whole, restarts = jpeg(), jpeg(restart_marker_blocks=3)
    frame, scan = place_of(whole, 0xC0), place_of(whole, 0xDA)
    first = restarts.index(b"\xff\xd0", place_of(restarts, 0xDA))
    return {
        "progressive": jpeg(progressive=True),
        "four colours": jpeg(Image.new("CMYK", (40, 30), (10, 200, 30, 40))),
        "RGB": jpeg(keep_rgb=True),
        "small": jpeg(noisy(15, 40)),
        "no JPEG": encoded(noisy()),
        "12 bits": changed(whole, frame + 4, 12),
        "4:1:1": changed(whole, frame + 11, 0x41),
        "4:4:0": changed(whole, frame + 11, 0x12),
        "more chroma than luma": changed(whole, frame + 14, 0x21),
        "components by letters": changed(whole, frame + 10, ord("R")),
        "no height": whole[: frame + 5] + b"\0\0" + whole[frame + 7 :],
        "extended": changed(whole, frame + 1, 0xC1),
        "arithmetic codes": changed(whole, frame + 1, 0xC9),
        "no table": changed(whole, scan + 6, 0x33),
        "part of a spectrum": changed(whole, scan + 12, 5),
        "no end": whole[:-2],
        "an end too early": whole[: scan + 200] + b"\xff\xd9",
        "a restart that nobody announced": whole[: scan + 200] + b"\xff\xd0" + whole[scan + 200 :],
        "a restart too few": restarts[:first] + restarts[first + 2 :],
        "restarts out of order": changed(restarts, first + 1, 0xD3),
        "a segment in the scan": whole[: scan + 200] + b"\xff\xc4\0\2" + whole[scan + 200 :],
        "padding in the scan": whole[: scan + 200] + b"\xff\xff\0" + whole[scan + 200 :],
    }


@pytest.mark.parametrize("name", plain_files())
def test_a_plain_file_stays_undecoded_and_gives_what_it_always_gave(name):
    content = plain_files()[name]
    found = open_undecoded(content)
    assert isinstance(found, PlainJpeg)
    assert np.array_equal(np.asarray(decode_plain(found)), np.asarray(open_image(content)))
    assert not any(word in found.stream for word in (b"Exif", b"JFIF", b"ICC", b"another"))
    assert found.stream[-2:] == b"\xff\xd9"
    assert (found.width, found.height) == noisy().size


@pytest.mark.parametrize("name", [name for name in other_files() if name != "an end too early"])
def test_other_files_go_the_usual_way(name):
    content = other_files()[name]
    assert plain_stream(content) is None
    assert answer(open_undecoded, content) == answer(open_image, content)


def test_a_file_that_ends_too_early_is_taken_as_pillow_takes_it():
    content = other_files()["an end too early"]
    assert isinstance(open_undecoded(content), PlainJpeg)
    assert open_image(content).size == noisy().size


def answer(way, content):
    """The pixels that a way gives, or its reason."""
    try:
        found = way(content)
    except UnreadableImage as reason:
        return str(reason)
    found = decode_plain(found) if isinstance(found, PlainJpeg) else found
    return found.size, found.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_file_keeps_its_turn(orientation):
    content = jpeg(exif=exif(orientation))
    found = open_undecoded(content)
    assert found.orientation == orientation
    assert np.array_equal(np.asarray(decode_plain(found)), np.asarray(open_image(content)))


def test_a_file_cut_anywhere_is_no_whole_one():
    for content in (jpeg(), jpeg(restart_marker_blocks=3)):
        assert not any(plain_stream(content[:length]) for length in range(len(content)))


def test_limits_are_those_of_every_image():
    strip = jpeg(Image.new("RGB", (16 * 101, 16)))
    with pytest.raises(UnreadableImage, match="1616 x 16 is a strip longer than 100:1"):
        open_undecoded(strip)
    with pytest.raises(UnreadableImage, match=r"72 x 50 is over 0\.001 million pixels"):
        open_undecoded(jpeg(), max_pixels=1000)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_passes_pillow_takes(data):
    """Bytes are changed, left out and put in: a file that another decoder is given is none that would be refused."""
    content = bytearray(data.draw(st.sampled_from(list(plain_files().values()))))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(2, len(content) - 1) | st.integers(2, 700))
        put = data.draw(st.binary(max_size=3) | st.sampled_from([b"\xff\xd9", b"\xff\xd0", b"\xff\0"]))
        content[place : place + data.draw(st.integers(0, 3))] = put
    assert answer(open_undecoded, bytes(content)) == answer(open_image, bytes(content))
