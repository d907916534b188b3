"""One picture in every form that people hold it scores the same, and what is no picture is refused by name."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image

from deltaclip import DeltaclipMetric, Scorer
from deltaclip.pipeline.api.pictures import from_pixels

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def scorer(demo_run):
    return Scorer.load(demo_run, device="cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory, demo_folder, demo_rows):
    """A picture that is wider than high, so that no axis is taken for another."""
    out = tmp_path_factory.mktemp("picture") / "a.png"
    with Image.open(demo_folder / demo_rows[0]["image"]) as image:
        image.convert("RGB").crop((0, 0, 120, 90)).save(out)
    return out


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def tensor(path):
    return torch.from_numpy(pixels(path).copy()).permute(2, 0, 1)


def opaque(path):
    return np.dstack([pixels(path), np.full((90, 120), 255, np.uint8)])


FORMS = {
    "str": str,
    "numpy str": np.str_,
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "file": lambda path: io.BytesIO(path.read_bytes()),
    "PIL": lambda path: Image.fromarray(pixels(path)),
    "HWC": pixels,
    "CHW": lambda path: pixels(path).transpose(2, 0, 1),
    "NHWC": lambda path: pixels(path)[None],
    "float64": lambda path: pixels(path) / 255,
    "RGBA": opaque,
    "RGBA float": lambda path: (opaque(path) / 255).astype(np.float32),
    "tensor": tensor,
    "tensor HWC": lambda path: torch.from_numpy(pixels(path).copy()),
    "tensor float": lambda path: tensor(path).float() / 255,
    "tensor half": lambda path: (tensor(path).float() / 255).half(),
    "tensor bfloat16": lambda path: (tensor(path).float() / 255).bfloat16(),
    "tensor with gradients": lambda path: (tensor(path).float() / 255).requires_grad_(),
    "tensor batch": lambda path: tensor(path)[None].float() / 255,
    "list of a batch of one": lambda path: [tensor(path)[None]],
    "tuple": lambda path: (path,),
    "generator": lambda path: (each for each in [path]),
    "row with bytes": lambda path: {"bytes": path.read_bytes(), "path": None},
    "row with a path": lambda path: {"bytes": None, "path": str(path)},
    "row of a data set": lambda path: {"image": Image.fromarray(pixels(path)), "prompt": "of the row"},
    "row of an undecoded data set": lambda path: [{"image": {"bytes": path.read_bytes(), "path": "a.png"}}],
    "batch of rows": lambda path: {"image": [Image.fromarray(pixels(path))], "prompt": ["of the row"]},
    "array of objects": lambda path: np.array([path], dtype=object),
    "array of texts": lambda path: np.array([str(path)]),
    "pandas": lambda path: pd.Series([str(path)], index=[7]),
    "row of pandas": lambda path: pd.DataFrame({"image": [str(path)], "prompt": ["x"]}).iloc[0],
    "named rows of pandas": lambda path: pd.DataFrame({"image": [str(path)], "prompt": ["x"]}).itertuples(),
    "column named by texts": lambda path: pd.Series([str(path)], index=["first"]),
    "pyarrow": lambda path: pa.array([str(path)]),
    "pyarrow bytes": lambda path: pa.array([path.read_bytes()]),
    "pyarrow chunks": lambda path: pa.chunked_array([[str(path)]]),
    "pyarrow struct": lambda path: pa.array([{"bytes": path.read_bytes(), "path": "a.png"}]),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_picture_scores_the_same_in_every_form(scorer, path, form):
    expected = scorer.score(path, PROMPT)
    found = scorer.score(form(path), PROMPT)
    assert found.failed == {}
    for name, values in found.scores.columns().items():
        assert values == pytest.approx(expected.scores.columns()[name], abs=1e-6), name


def test_grey_pixels_score_what_their_file_scores(scorer, tmp_path):
    level_HW = (np.arange(64 * 48).reshape(48, 64) % 256).astype(np.uint8)
    path = tmp_path / "grey.png"
    Image.fromarray(level_HW).save(path)
    expected = scorer.score(path, PROMPT).q.tolist()
    for form in (
        level_HW,
        level_HW[None],
        level_HW[:, :, None],
        torch.from_numpy(level_HW) / 255,
        level_HW[None, None],
    ):
        assert scorer.score(form, PROMPT).q.tolist() == expected


def test_what_is_transparent_is_laid_over_white_as_of_a_file(scorer, path, tmp_path):
    rgba = opaque(path)
    rgba[:, :60, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "half.png")
    assert scorer.score(rgba, PROMPT).q == scorer.score(tmp_path / "half.png", PROMPT).q


def test_a_batch_of_tensors_goes_pair_by_pair(scorer, path):
    batch = torch.stack([tensor(path), tensor(path).flip(-1)]).float() / 255
    found = scorer.score(batch, ("a red circle", "a green square"), batch_size=1)
    alone = [
        scorer.score(each, prompt).c for each, prompt in zip(batch, ("a red circle", "a green square"), strict=True)
    ]
    assert found.c.tolist() == [float(each[0]) for each in alone]
    assert scorer.score(list(batch), PROMPT).q.shape == (2,)


@pytest.mark.parametrize(
    "prompts",
    [
        ("a", "b"),
        (text for text in "ab"),
        np.array(["a", "b"]),
        np.array(["a", "b"], dtype=object),
        pd.Series(["a", "b"], index=[4, 2]),
        pa.array(["a", "b"]),
        pa.chunked_array([["a"], ["b"]]),
    ],
    ids=lambda prompts: type(prompts).__name__,
)
def test_prompts_come_in_every_kind_of_column(scorer, path, prompts):
    assert scorer.score(path, prompts).c.tolist() == scorer.score(path, ["a", "b"]).c.tolist()


FULL = np.zeros((8, 12, 3))
REFUSED = {
    "channels on both sides": (
        np.zeros((3, 8, 3), np.uint8),
        "images[0] is an array of uint8 (3, 8, 3): its channels may stand first or last; give a PIL image",
    ),
    "five channels": (
        torch.zeros(2, 5, 8, 12),
        "images[0] is an array of float32 (5, 8, 12): pixels are (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4",
    ),
    "no pixels": (
        np.zeros((8, 0, 3)),
        "images[0] is an array of float64 (8, 0, 3): pixels are (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4",
    ),
    "a batch in a list": (
        [torch.zeros(2, 3, 8, 12)],
        "images[0] is an array of float32 (2, 3, 8, 12): pixels are (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4",
    ),
    "integers": (FULL.astype(np.int64), "images[0] has pixels of int64: give uint8, or floats from 0 to 1"),
    "flags": (FULL > 0, "images[0] has pixels of bool: give uint8, or floats from 0 to 1"),
    "-1 to 1": (
        [FULL, FULL + np.linspace(-1, 1, 3)],
        "images[1] has float pixels from -1 to 1, outside 0 to 1: give (x + 1) / 2",
    ),
    "0 to 255": (FULL + 255, "images[0] has float pixels from 255 to 255, outside 0 to 1: give x / 255"),
    "normalised": (
        FULL + np.linspace(-1.8, 2.1, 3),
        "images[0] has float pixels from -1.8 to 2.1, outside 0 to 1: give pixels as they were before they were "
        "normalised",
    ),
    "overshot": (
        FULL + np.linspace(-0.1, 1.1, 3),
        "images[0] has float pixels from -0.1 to 1.1, outside 0 to 1: clip what resizing has overshot",
    ),
    "NaN": (
        torch.where(torch.arange(12) < 5, torch.zeros(3, 8, 12), torch.nan),
        "images[0] has pixels that are NaN or infinite, the first in row 0, column 5",
    ),
    "a table": (
        pd.DataFrame({"image": ["a.png"]}),
        "images is a table, of type pandas.DataFrame: give one of its columns",
    ),
    "a row without image": (
        {"prompt": "x"},
        "images[0] is a row without an image, it has prompt: give the image itself",
    ),
    "a set": ({"a.png"}, "images is of type set: give an image or a list of images"),
    "an array of no axis": (np.array(0.5), "images is an array of float64 (): give an image or a list of images"),
    "a number": (7, "images is of type int: give an image or a list of images"),
    "missing in a column": (
        pd.Series(["a.png", None]),
        "images[1] is of type float: give a path, a PIL image, the bytes of a file, or pixels",
    ),
}


@pytest.mark.parametrize(("images", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_picture_is_refused_by_place(scorer, images, words):
    with pytest.raises((ValueError, TypeError)) as error:
        scorer.score(images, PROMPT)
    assert str(error.value) == words


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("  ", "prompts is empty"),
        (["x", "\t"], "prompts[1] is empty"),
        (["x", None], "prompts[1] is of type NoneType, not a text"),
        (pd.Series(["x", None], dtype=object), "prompts[1] is of type NoneType, not a text"),
        (["\ud800"], "prompts[0] holds half a character (U+D800), which is no text"),
        ({"x": "y"}, "prompts is of type dict: give a text or a list of texts"),
        (7, "prompts is of type int: give a text or a list of texts"),
        (np.array("x"), "prompts is an array of <U1 (): give a text or a list of texts"),
        (["x", "y", "z"], "2 images but 3 prompts: give one prompt an image, or a single text for all"),
    ],
)
def test_what_is_no_prompt_is_refused_by_place(scorer, prompts, words):
    with pytest.raises((ValueError, TypeError)) as error:
        scorer.score(["a.png", "b.png"], prompts)
    assert str(error.value) == words


def test_an_image_of_one_row_or_column_has_its_channels_where_three_are():
    assert from_pixels(np.zeros((1, 7, 3)), "x").size == (7, 1)
    assert from_pixels(np.zeros((4, 7, 1)), "x").size == (1, 7)


def test_rounding_beyond_the_range_is_no_fault():
    assert np.asarray(from_pixels(np.full((2, 5, 3), 1 + 1e-7), "x")).tolist() == [[[255] * 3] * 5] * 2


def test_an_empty_file_in_memory_and_no_images_at_all(scorer, path):
    assert scorer.score([b"", path], PROMPT).failed == {0: "empty file"}
    assert scorer.score(np.zeros((0, 8, 12, 3)), PROMPT).q.shape == (0,)
    with pytest.raises(ValueError, match=r"^batch_size is 0: give 1 or more$"):
        scorer.score(path, PROMPT, batch_size=0)


def test_without_prompts_there_is_quality_alone(scorer, path):
    found, full = scorer.score([path, path]), scorer.score([path, path], PROMPT)
    assert found.q.tolist() == full.q.tolist()
    assert found.scores.targets["quality"].base.tolist() == full.scores.targets["quality"].base.tolist()
    assert np.isnan([found.c, *found.scores.targets["consistency"]]).all()
    metric = DeltaclipMetric(scorer)
    metric.update(tensor(path)[None] / 255)
    assert (int(metric.quality_count), int(metric.consistency_count)) == (1, 0)
    consistency_only = Scorer(scorer.heads, scorer.backbone, ["consistency"])
    with pytest.raises(ValueError, match=r"^this run has learned consistency alone, which needs prompts: give one an"):
        consistency_only.score(path)
