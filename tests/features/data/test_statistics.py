"""Numbers of a picture: sizes, equal bits, what each answers to, and the document that says what they are."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image, ImageFilter

import deltaclip
from deltaclip.features.data.images import open_image
from deltaclip.features.data.statistics import NAMES, native_planes, statistics_of
from deltaclip.features.data.views import RECIPES, STATISTICS
from deltaclip.features.scenes.draw import draw_scene, random_scene

PAGE = Path(deltaclip.__file__).parent / "docs" / "statistics.md"
DATA = Path(deltaclip.__file__).parent / "tests" / "data"


def numbers(image):
    return dict(zip(NAMES, statistics_of(image).tolist(), strict=True))


def luma(image):
    return np.asarray(image.convert("YCbCr").getchannel("Y"))


def random_picture(width, height, seed=0):
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (max(1, height // 9), max(1, width // 9), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return Image.fromarray(np.clip(smooth + generator.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def scene():
    return draw_scene(random_scene([3]), 320)


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return open_image(buffer.getvalue())


def test_the_document_lists_every_number_in_order():
    assert tuple(re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", PAGE.read_text("utf-8"), flags=re.MULTILINE)) == NAMES
    assert f"{len(NAMES)} numbers" in PAGE.read_text("utf-8")
    assert len(set(NAMES)) == len(NAMES)


def drawn_by_whole_numbers():
    """A picture that no library's version changes: ramps, stripes, blocks and a noise, in whole numbers."""
    y, x = np.mgrid[:300, :420].astype(np.int64)
    noise = (x * 7919 + y * 104729 + x * y * 31) % 23
    red, green = x // 2 + y * y // 300 + noise, 90 + 40 * ((x // 24 + y // 40) % 3) + noise
    blue = 255 - y // 2 - x * x // 900 + noise // 2
    return Image.fromarray(np.clip(np.stack([red, green, blue], axis=2), 0, 255).astype(np.uint8))


def test_a_number_that_changes_asks_for_another_version():
    """A cache tells by the version alone that its numbers are others: raise it in `RECIPES`, and record the new ones.

    python -m deltaclip.tests.features.data.test_statistics
    """
    recorded = DATA / f"statistics_version_{RECIPES[STATISTICS]['version']}.json"
    assert recorded.is_file(), "numbers of a new version are to be recorded"
    expected = json.loads(recorded.read_text("utf-8"))
    assert tuple(expected) == NAMES
    for name, found in numbers(drawn_by_whole_numbers()).items():
        # Of another processor the last digits of a float32 may differ, and a sum's with the width of its units.
        assert found == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


SIDES = [1, 2, 7, 63, 64, 65, 71, 127, 128, 129, 136, 255, 257, 383, 384, 385, 800]


@pytest.mark.parametrize("width", SIDES)
@pytest.mark.parametrize("height", [1, 64, 129, 500])
def test_every_size_has_finite_numbers(width, height):
    found = statistics_of(random_picture(width, height))
    assert found.shape == (len(NAMES),)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (9000, 3), (64, 64), (500, 400)])
@pytest.mark.parametrize("colour", ["black", "white", "red", (1, 2, 3)])
def test_constant_pictures_have_finite_numbers(size, colour):
    found = numbers(Image.new("RGB", size, colour))
    assert all(np.isfinite(list(found.values())))
    assert found["tone_contrast"] == found["tone_entropy"] == found["tone_unused"] == 0
    assert found["gradient_flat_1"] == found["block_grid_across"] + 1 == 1
    assert found["spectrum_slope"] == pytest.approx(0, abs=1e-12)


def test_a_huge_picture_is_read_at_nine_places():
    picture = random_picture(64, 64).resize((4096, 3000), Image.Resampling.NEAREST)
    assert native_planes(picture).luma_THW.shape == (9, 128, 128)
    assert np.isfinite(statistics_of(picture)).all()


@pytest.mark.parametrize("side", SIDES)
def test_tiles_lie_inside_on_the_grid_of_jpeg_apart(side):
    ramp = np.broadcast_to((np.arange(max(side, 64)) % side)[None], (64, max(side, 64)))
    levels = np.stack([ramp % 256, ramp // 256, np.zeros_like(ramp)], axis=2).astype(np.uint8)[:, :side]
    seen = native_planes(Image.fromarray(levels)).luma_THW
    assert seen.shape[2] % 8 == 0
    assert 64 <= seen.shape[2] <= 128
    covered = len(seen) * seen.shape[2]
    assert covered >= min(side, 384) - 8 * len(seen)  # what is left out is less than a block a tile
    grey = luma(Image.fromarray(levels))[0]
    if side >= 64:
        for tile in seen:
            starts = [
                at for at in range(0, side - seen.shape[2] + 1, 8) if (grey[at : at + seen.shape[2]] == tile[0]).all()
            ]
            assert starts, "a tile starts at a multiple of 8"


def test_modes_come_as_the_opened_file_gives_them():
    grey = random_picture(90, 70).convert("L")
    found = {}
    for mode in ("L", "P", "RGB", "RGBA"):
        buffer = io.BytesIO()
        grey.convert(mode).save(buffer, "PNG")
        found[mode] = statistics_of(open_image(buffer.getvalue()))
    for own in found.values():
        np.testing.assert_array_equal(own, found["L"])
    assert dict(zip(NAMES, found["L"].tolist(), strict=True))["colour_grey"] == 1
    with pytest.raises(ValueError, match=r"an RGB picture is needed, not one of mode L"):
        statistics_of(grey)


def test_equal_bits_in_every_thread_and_process():
    pictures = [random_picture(200 + 37 * n, 150 + 61 * n, seed=n) for n in range(8)]
    alone = [statistics_of(picture) for picture in pictures]
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(statistics_of, pictures * 4):
            assert any(np.array_equal(found, one) for one in alone)
        np.testing.assert_array_equal(list(pool.map(statistics_of, pictures)), alone)
    # A copy of the pixels at another address, whose alignment must not matter.
    for picture, found in zip(pictures, alone, strict=True):
        np.testing.assert_array_equal(statistics_of(Image.fromarray(np.asarray(picture))), found)


def test_the_size():
    found = numbers(random_picture(512, 128))
    assert (found["size_area"], found["size_short_side"], found["size_aspect"]) == (16, 7, 2)


def test_tone_against_scipy():
    image = random_picture(96, 80)
    level = luma(image).astype(float).ravel()
    found = numbers(image)
    sd = level.std()
    share = np.bincount(level.astype(int)) / level.size
    expected = {
        "tone_mean": level.mean() / 255,
        "tone_contrast": sd / 255,
        "tone_skewness": scipy.stats.skew(level) * sd**3 / (sd**3 + 1),
        "tone_kurtosis": np.log((scipy.stats.moment(level, 4) + 1) / (sd**4 + 1)),
        "tone_entropy": scipy.stats.entropy(share, base=2),
        "tone_black": np.sqrt((level <= 4).mean()),
        "tone_white": np.sqrt((level >= 251).mean()),
    }
    # float32 keeps seven digits
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-7)
    for share in (1, 10, 50, 90, 99):  # a level counts as spread over one, numpy takes it as a point
        assert found[f"tone_p{share:02}"] * 255 == pytest.approx(np.percentile(level, share), abs=0.6)


def test_colour_against_the_formulas():
    image = random_picture(120, 90, seed=4)
    red, green, blue = np.moveaxis(np.asarray(image).astype(float), 2, 0).reshape(3, -1)
    rg, yb = red - green, (red + green) / 2 - blue
    high, low = np.max([red, green, blue], axis=0), np.min([red, green, blue], axis=0)
    saturation = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    covariance = ((rg - rg.mean()) * (yb - yb.mean())).mean()
    found = numbers(image)
    expected = {
        "colour_colourfulness": np.log1p(np.sqrt(rg.var() + yb.var()) + 0.3 * np.hypot(rg.mean(), yb.mean())),
        "colour_rg_mean": rg.mean() / 255,
        "colour_yb_mean": yb.mean() / 255,
        "colour_rg_spread": np.log1p(rg.std()),
        "colour_yb_spread": np.log1p(yb.std()),
        "colour_rg_yb_correlation": covariance / (rg.std() * yb.std() + 1),
        "colour_dark_channel": low.mean() / 255,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-6)
    # Pillow's HSV has 8 bits and cuts them off: half a level on average
    assert found["colour_saturation_mean"] == pytest.approx(saturation.mean(), abs=1 / 255)
    assert found["colour_saturation_spread"] == pytest.approx(saturation.std(), abs=1 / 255)


def rises(values):
    return all(later > earlier for earlier, later in itertools.pairwise(values))


def test_blur_lowers_sharpness_and_raises_reblur(scene):
    found = [numbers(scene.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 4)]
    for name in ("gradient_mean_1", "laplacian_1", "gradient_p99_1", "spectrum_high"):
        assert rises([-one[name] for one in found[:3]]), name  # the last has less than a level of high frequencies
    assert rises([one["reblur_1"] for one in found])


def test_noise_raises_its_estimate_and_little_else_of_the_tone(scene):
    pixels, generator = np.asarray(scene).astype(float), np.random.default_rng(1)
    found = []
    for sd in (0, 2, 5, 12, 30):
        noisy = np.clip(pixels + generator.normal(0, 1, pixels.shape) * sd, 0, 255).round().astype(np.uint8)
        found.append(numbers(Image.fromarray(noisy)))
    for name in ("noise_1", "local_p10_1", "block_crossings_across", "chroma_red_noise"):
        assert rises([one[name] for one in found]), name


def test_jpeg_raises_blockiness(scene):
    found = [numbers(scene if quality is None else jpeg(scene, quality)) for quality in (None, 20, 5)]
    for way in ("across", "down"):
        assert rises([one[f"block_grid_{way}"] for one in found])
    shifted = jpeg(scene, 5).crop((3, 5, 320, 320))
    across = numbers(shifted)
    assert across["block_grid_across"] < 0.2 * found[-1]["block_grid_across"]
    assert across["block_phase_across"] > 0.5 * found[-1]["block_phase_across"]


def test_enlarging_lowers_the_high_frequencies(scene):
    found = []
    for factor in (1, 2, 4):
        small = scene.resize((320 // factor, 320 // factor), Image.Resampling.BOX)
        found.append(numbers(small.resize((320, 320), Image.Resampling.BILINEAR)))
    assert rises([-one["spectrum_high"] for one in found])
    assert rises([-one["gradient_mean_1"] for one in found])


def test_turning_a_picture_changes_the_sign_of_directions(scene):
    straight, turned = numbers(scene), numbers(scene.transpose(Image.Transpose.TRANSPOSE))
    for name in ("gradient_direction_1", "gradient_direction_4", "spectrum_direction"):
        assert turned[name] == pytest.approx(-straight[name], abs=1e-4), name
    for name in ("noise_1", "laplacian_1", "reblur_2", "mscn_shape_1", "tone_mean", "spectrum_slope"):
        assert turned[name] == pytest.approx(straight[name], abs=1e-4), name


def test_importing_it_brings_no_model_library():
    code = "import deltaclip.features.data.statistics, sys; assert not {'torch', 'scipy', 'h5py'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    version = RECIPES[STATISTICS]["version"]
    text = json.dumps(numbers(drawn_by_whole_numbers()), indent=1)
    (DATA / f"statistics_version_{version}.json").write_text(text + "\n", "utf-8")
