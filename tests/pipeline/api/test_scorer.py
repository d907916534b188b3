"""The scorer for callers of the Python API."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from PIL import Image

from deltaclip import Scorer
from deltaclip.features.data.images import open_image
from deltaclip.pipeline.api.scorer import pair
from deltaclip.tests.features.data.odd_images import usable_files


@pytest.fixture(scope="module")
def scorer(demo_run):
    return Scorer.load(demo_run, device="cpu")


def test_load_takes_a_string_and_keeps_what_was_trained(scorer, demo_run):
    assert Scorer.load(str(demo_run), device="cpu").labels == scorer.labels == ("quality", "consistency")
    assert not scorer.heads.training
    assert not scorer.backbone.model.training


def test_rows_may_repeat_images_and_prompts(scorer, demo_folder, demo_rows):
    paths = [demo_folder / row["image"] for row in demo_rows[:3]]
    prompts = [row["prompt"] for row in demo_rows[:3]]
    found = scorer.score([*paths, *paths[::-1]], [*prompts, *prompts[::-1]], batch_size=2)
    for values in found.scores.columns().values():
        assert values[:3] == pytest.approx(values[3:][::-1], abs=5e-3)  # other batches, other bf16 rounding
    assert found.failed == {}


def test_links_that_leave_the_root_are_refused(scorer, demo_folder, demo_rows, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(demo_folder / demo_rows[0]["image"])
    inside = scorer.score([root / "link.png"], ["x"], root=root)
    assert inside.failed == {0: "links to a file outside the image root"}
    assert np.isnan(inside.q).all()
    assert scorer.score([root / "link.png"], ["x"]).failed == {}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, demo_folder, demo_rows):
    """Paths of three demo images and of files of odd kinds."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, content in usable_files().items():
        (folder / name).write_bytes(content)
    return [*(demo_folder / row["image"] for row in demo_rows[:3]), *sorted(folder.iterdir())]


def same(first, second):
    return all(
        values == second.scores.columns()[name]
        if isinstance(values, list)
        else np.array_equal(values, second.scores.columns()[name], equal_nan=True)
        for name, values in first.scores.columns().items()
    )


def test_images_in_memory_score_what_their_files_score_to_the_last_bit(scorer, pictures):
    from_files = scorer.score(pictures, "a red circle")
    assert from_files.failed == {}
    assert np.isfinite(from_files.q).all()
    with contextlib.ExitStack() as open_files:  # Pillow keeps animations open
        opened = [open_files.enter_context(Image.open(path)) for path in pictures]
        assert same(from_files, scorer.score(opened, "a red circle"))
        assert same(from_files, scorer.score(opened, "a red circle")), "a second time, when Pillow has decoded them"
    pixels = [np.asarray(open_image(path.read_bytes())) for path in pictures]
    assert same(from_files, scorer.score(pixels, "a red circle"))


def test_kinds_of_images_mix(scorer, pictures):
    path = pictures[0]
    pixels = np.asarray(open_image(path.read_bytes()))
    with Image.open(path) as opened:
        found = scorer.score([path, str(path), opened, pixels], ["a red circle"] * 4, batch_size=1)
    for scores in (found.q, found.c):
        assert scores.tolist() == pytest.approx([scores[0]] * 4, abs=1e-6)  # rows of a batch are summed in other orders
    stacked = scorer.score(np.stack([pixels, pixels]), "a red circle", batch_size=1)
    assert stacked.q.tolist() == pytest.approx(found.q[:2].tolist(), abs=1e-6)


def test_one_prompt_or_one_image_goes_with_all_others(scorer, pictures):
    prompts = ["a red circle", "a green square", "nothing"]
    each = [scorer.score([pictures[0]], [prompt]) for prompt in prompts]
    found = scorer.score(pictures[0], prompts)
    assert found.c.tolist() == pytest.approx([float(one.c[0]) for one in each], abs=5e-3)  # bf16, other batches
    assert found.q.tolist() == pytest.approx([found.q[0]] * 3, abs=1e-6)
    assert scorer.score(pictures[:2], "x").q.shape == (2,)
    assert scorer.score([], []).q.shape == scorer.score([], "x").q.shape == (0,)


def test_an_image_in_several_pairs_is_encoded_once(scorer, pictures):
    picture = Image.new("RGB", (8, 8))
    pairs = pair([picture, pictures[1], picture, str(pictures[1])], ["a", "b", "c", "d"])
    assert pairs.image_N == [0, 1, 0, 1]
    assert len(pairs.sources) == 2


@pytest.mark.parametrize(
    ("images", "prompts", "words"),
    [
        (["a.png", "b.png"], ["x"], "2 images but 1 prompts: give one prompt an image, or a single text for all"),
        (
            ["a.png", None],
            "x",
            "images[1] is of type NoneType: give a path, a PIL image, the bytes of a file, or pixels",
        ),
        (["a.png"], [7], "prompts[0] is of type int, not a text"),
        (["a.png"], [b"x"], "prompts[0] is of type bytes, not a text"),
    ],
)
def test_what_is_no_image_or_no_prompt_is_refused_by_name(scorer, images, prompts, words):
    with pytest.raises((ValueError, TypeError)) as error:
        scorer.score(images, prompts)
    assert str(error.value) == words


def test_images_in_memory_have_the_limits_of_files(scorer):
    grey = Image.new("L", (4, 4))
    grey.format, grey.info["transparency"] = "PNG", 3
    odd = [Image.new("F", (4, 4)), np.zeros((5, 505, 3), np.uint8), grey]
    assert scorer.score(odd, "x").failed == {
        0: "float pixels have no known range",
        1: "505 x 5 is a strip longer than 100:1",
        2: "a PNG with a transparent colour: only its file tells which, so give its path",
    }


def test_paths_are_understood_as_people_write_them(scorer, pictures, monkeypatch):
    monkeypatch.chdir(pictures[0].parent.parent)
    name = f"{pictures[0].parent.name}\\{pictures[0].name}"
    found = scorer.score([pictures[0], name, f"file://{pictures[0]}", f'"{pictures[0]}" '], "x")
    assert found.q.tolist() == pytest.approx([found.q[0]] * 4, abs=1e-6)
    assert found.failed == {}


def test_a_truncated_file_that_pillow_has_opened_is_listed(scorer, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:-400])
    with Image.open(broken) as opened:
        found = scorer.score([opened, pictures[1]], "x")
    assert list(found.failed) == [0]
    assert found.failed[0].startswith("broken image data")
    assert np.isfinite(found.q[1])
