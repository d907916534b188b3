"""Views as pixels: names, and tiles that cover an image evenly without overlap at its own resolution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deltaclip.base.errors import UserError
from deltaclip.features.data.views import (
    MAX_TILES,
    RECIPES,
    cut_tiles,
    fit_whole,
    parse_views,
    tile_corners,
    whole_short_side,
)

CUBIC = Image.Resampling.BICUBIC


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("center", ("center",)),
        ("flip", ("center", "flip")),
        ("tiles,flip", ("center", "tiles", "flip")),
        (" flip , center,flip", ("center", "flip")),
    ],
)
def test_names(text, names):
    assert parse_views(text) == names


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("flipp", "--views: 'flipp' is no view; did you mean 'flip'?"),
        ("center,", "--views: '' is no view; known: center, flip, tiles, stages, statistics, anchors"),
        ("", "--views: '' is no view; known: center, flip, tiles, stages, statistics, anchors"),
        ("flip tiles", "--views: 'flip tiles' is no view; did you mean 'tiles'?"),
    ],
)
def test_what_is_no_view(text, line):
    with pytest.raises(UserError) as caught:
        parse_views(text)
    assert str(caught.value) == line


def test_every_recipe_is_another():
    assert len({str(recipe) for recipe in RECIPES.values()}) == len(RECIPES)


def numbered(height, width):
    """An image in which every pixel says where it is."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([y % 256, x % 256, y // 256 * 16 + x // 256], axis=2).astype(np.uint8))


def places(tiles):
    """Return (top, left) of every tile from its first pixel, and check that the rest of it is native pixels."""
    found = []
    for tile in tiles.astype(int):
        y, x = tile[2] // 16 * 256 + tile[0], tile[2] % 16 * 256 + tile[1]
        top, left = y[0, 0], x[0, 0]
        np.testing.assert_array_equal(y, top + np.arange(tile.shape[1])[:, None] + 0 * x)
        np.testing.assert_array_equal(x, left + np.arange(tile.shape[2])[None] + 0 * y)
        found.append((int(top), int(left)))
    return found


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (8, 8, [(0, 0)]),
        (15, 15, [(3, 3)]),
        (16, 16, [(0, 0), (0, 8), (8, 0), (8, 8)]),
        (17, 23, [(0, 1), (0, 13), (8, 1), (8, 13)]),
        (24, 24, [(y, x) for y in (0, 8, 16) for x in (0, 8, 16)]),
        (40, 40, [(y, x) for y in (2, 16, 29) for x in (2, 16, 29)]),  # 25 would fit: nine, squares rather than a row
        (8, 72, [(0, x) for x in range(0, 72, 8)]),
        (8, 800, [(0, (2 * n + 1) * 400 // 9 - 4) for n in range(9)]),
        (16, 64, [(y, x) for y in (0, 8) for x in (4, 20, 36, 52)]),  # 2 x 4 cells of 8 x 16, not 1 x 8
    ],
)
def test_tiles_of_eight_pixels(height, width, expected):
    tiles = cut_tiles(numbered(height, width), 8, 8, resample=CUBIC)
    assert tiles.dtype == np.uint8
    assert tiles.shape == (len(expected), 3, 8, 8)
    assert places(tiles) == expected
    assert places(cut_tiles(numbered(width, height), 8, 8, resample=CUBIC)) == sorted((x, y) for y, x in expected)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 500), st.integers(1, 500))
def test_tiles_lie_inside_and_apart_and_spread_evenly(height, width, more_height, more_width):
    image_height, image_width = height + more_height - 1, width + more_width - 1
    tops, lefts = tile_corners(image_height, image_width, height, width)
    fit = (image_height // height) * (image_width // width)
    assert min(fit, 5) <= len(tops) * len(lefts) <= min(fit, MAX_TILES)
    for corners, part, length in ((tops, height, image_height), (lefts, width, image_width)):
        assert corners[0] >= 0
        assert corners[-1] + part <= length
        gaps = np.diff(corners) - part
        assert (gaps >= 0).all()
        margins = [corners[0], length - corners[-1] - part]
        assert max(margins) - min(margins) <= 1
        if len(gaps):
            assert gaps.max() - gaps.min() <= 1
            assert abs(gaps.mean() - sum(margins)) <= 1  # half a gap on each side


@pytest.mark.parametrize(
    ("height", "width", "resized", "count"),
    [(7, 7, (8, 8), 1), (1, 1, (8, 8), 1), (4, 8, (8, 16), 2), (7, 20, (8, 23), 2), (3, 300, (8, 800), 9)],
)
def test_a_smaller_image_is_enlarged_first(height, width, resized, count):
    image = numbered(height, width)
    tiles = cut_tiles(image, 8, 8, resample=CUBIC)
    expected = cut_tiles(image.resize(resized[::-1], CUBIC), 8, 8, resample=CUBIC)
    np.testing.assert_array_equal(tiles, expected)
    assert len(tiles) == count


def test_tiles_that_are_not_square():
    tiles = cut_tiles(numbered(20, 20), 10, 5, resample=CUBIC)
    assert places(tiles) == [(y, x) for y in (0, 10) for x in (0, 5, 10, 15)]
    assert cut_tiles(numbered(5, 5), 10, 5, resample=CUBIC).shape == (2, 3, 10, 5)


@pytest.mark.parametrize(("size", "short_side"), [(224, 384), (336, 576), (96, 165), (1, 2)])
def test_a_whole_image_is_larger_than_the_input(size, short_side):
    assert whole_short_side(size) == short_side


@pytest.mark.parametrize(
    ("size", "whole"),
    [
        ((1, 1), (60, 60)),
        ((60, 60), (60, 60)),
        ((59, 61), (60, 62)),
        ((100, 150), (60, 90)),
        ((90, 45), (120, 60)),
        ((91, 45), (120, 60)),
        ((2, 100), (60, 120)),
        ((30_000, 10), (120, 60)),
        ((10, 30_000), (60, 120)),
    ],
)
def test_a_whole_image_keeps_its_shape_up_to_two_to_one(size, whole):
    pixels = fit_whole(Image.new("RGB", size, (10, 20, 30)), 60, resample=CUBIC)
    assert (pixels.shape, pixels.dtype) == ((1, 3, whole[1], whole[0]), np.uint8)
    assert [np.unique(channel).tolist() for channel in pixels[0]] == [[10], [20], [30]]


def test_a_whole_image_of_the_right_size_is_as_it_was():
    image = numbered(60, 77)
    np.testing.assert_array_equal(fit_whole(image, 60, resample=CUBIC)[0].transpose(1, 2, 0), np.asarray(image))


def test_lying_and_standing_strips_are_treated_alike():
    image = numbered(50, 400)
    lying = fit_whole(image, 60, resample=CUBIC)[0]
    standing = fit_whole(image.transpose(Image.Transpose.TRANSPOSE), 60, resample=CUBIC)[0]
    np.testing.assert_array_equal(lying, standing.transpose(0, 2, 1))


def test_all_of_a_strip_is_in_its_whole_image():
    image = Image.new("RGB", (1000, 10))
    image.paste("white", (990, 0, 1000, 10))
    pixels = fit_whole(image, 60, resample=CUBIC)[0, 0]
    assert pixels[:, -1].min() > 250
    assert pixels[:, :100].max() < 5
