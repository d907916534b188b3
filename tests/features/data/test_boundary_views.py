"""Pictures of an image for a boundary file: a fixed set, of the input's shape, inside the image."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import to_tensor

from deltaclip.base.errors import UserError
from deltaclip.features.data.views import SMALLEST_SHARE, boundary_recipe, crop_box, view_pixels

KEYS = [hashlib.sha256(str(number).encode()).digest() for number in range(300)]


def picture(width=30, height=20):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(view, key=KEYS[0]):
    return view_pixels(view, picture(), key, preprocess=to_tensor, input_size=(16, 16)).numpy()


def test_center_and_flip():
    np.testing.assert_array_equal(pixels("center"), to_tensor(picture()))
    np.testing.assert_array_equal(pixels("flip"), pixels("center")[:, :, ::-1])


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (1, 1), (1, 500), (640, 480)])
@pytest.mark.parametrize("input_size", [(16, 16), (32, 16)])
def test_boxes_lie_inside_and_have_the_shape_of_the_input(size, input_size):
    largest = min(size[0] / input_size[1], size[1] / input_size[0])
    shares = []
    for key in KEYS:
        left, top, right, bottom = crop_box(size, key, input_size=input_size, number=1)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        for length, side in ((right - left, input_size[1]), (bottom - top, input_size[0])):
            assert length >= 1
            assert SMALLEST_SHARE * largest * side - 0.5 <= max(length, 1) or length == 1
            assert length <= max(1, largest * side + 0.5)
        shares.append((bottom - top) / (largest * input_size[0]))
    if size == (640, 480):  # evenly drawn: mean of 300 within 4 standard errors of 0.144 / sqrt(300)
        assert np.mean(shares) == pytest.approx((1 + SMALLEST_SHARE) / 2, abs=0.035)


def test_a_box_is_decided_by_image_and_number_alone():
    boxes = {crop_box((640, 480), key, input_size=(16, 16), number=number) for key in KEYS[:20] for number in (1, 2)}
    assert len(boxes) == 40
    assert crop_box((640, 480), KEYS[0], input_size=(16, 16), number=1) == crop_box(
        (640, 480), KEYS[0], input_size=(16, 16), number=1
    )
    left, top, right, bottom = crop_box((30, 20), KEYS[0], input_size=(16, 16), number=2)
    np.testing.assert_array_equal(pixels("crop-2"), to_tensor(picture())[:, top:bottom, left:right])


@pytest.mark.parametrize("view", ["crop", "crop-0", "crop-100", "tiles", ""])
def test_no_such_view(view):
    with pytest.raises(UserError) as caught:
        boundary_recipe(view)
    assert str(caught.value) == f"{view!r} is no view of a boundary cache; known: center, flip, crop-1 to crop-99"


def test_recipes_differ():
    recipes = [boundary_recipe(view) for view in ("center", "flip", "crop-1", "crop-2")]
    assert len({str(recipe) for recipe in recipes}) == 4
    assert recipes[2]["seed"] == 42
