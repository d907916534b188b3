"""The picture shows what the scene says, the same scene always the same way."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import label

from deltaclip.features.scenes.draw import (
    BACKGROUNDS,
    COLOURS,
    MAX_LARGE,
    SHAPES,
    STYLES,
    Group,
    Scene,
    draw_scene,
    outlines,
    placements,
    random_scene,
    visible_colours,
)


def one_group(style: str = "flat", background: str = "white", **group: object) -> Scene:
    filled = {"shape": "circle", "colour": "red", "count": 1, **group}
    return Scene(groups=(Group(**filled),), relation="", background=background, style=style, layout=5)  # type: ignore[arg-type]


def two_groups(relation: str, layout: int) -> Scene:
    groups = (Group(shape="circle", colour="red", count=2), Group(shape="square", colour="blue", count=3))
    return Scene(groups=groups, relation=relation, background="white", style="flat", layout=layout)


def near(image: np.ndarray, name: str) -> np.ndarray:
    """Mask (H, W) of pixels that are nearer to the named colour than to every other colour and background."""
    palette = {**COLOURS, **{f"on {b}": rgb for b, rgb in BACKGROUNDS.items()}}
    distances = np.stack([np.abs(image.astype(float) - rgb).sum(axis=2) for rgb in palette.values()])
    return distances.argmin(axis=0) == list(palette).index(name)


def test_same_seed_same_scene_and_pixels_other_seed_other() -> None:
    scenes = [random_scene([1, i]) for i in range(20)]
    assert scenes == [random_scene([1, i]) for i in range(20)]
    assert len(set(scenes)) == 20
    pictures = [draw_scene(s).tobytes() for s in scenes]
    assert pictures == [draw_scene(s).tobytes() for s in scenes]
    assert len(set(pictures)) == 20


@pytest.mark.parametrize("size", [1, 2, 31, 96, 128, 300])
def test_any_size(size: int) -> None:
    image = draw_scene(random_scene(3), size)
    assert (image.mode, image.size) == ("RGB", (size, size))


def test_random_scenes_keep_to_the_rules() -> None:
    scenes = [random_scene([2, i]) for i in range(800)]
    for scene in scenes:
        assert bool(scene.relation) == (len(scene.groups) == 2)
        assert len({g.shape for g in scene.groups}) == len({g.colour for g in scene.groups}) == len(scene.groups)
        for group in scene.groups:
            assert group.colour in visible_colours(scene.background)
            assert 1 <= group.count <= (MAX_LARGE if group.size == "large" else 4)
    assert {g.shape for s in scenes for g in s.groups} == set(SHAPES)
    assert {g.colour for s in scenes for g in s.groups} == set(COLOURS)
    assert {s.style for s in scenes} == set(STYLES)
    assert {s.background for s in scenes} == set(BACKGROUNDS)
    assert 0.2 < np.mean([len(s.groups) == 1 for s in scenes]) < 0.4


def test_things_do_not_overlap_and_stay_inside() -> None:
    for i in range(300):
        placed = placements(random_scene([3, i]))
        for index, (_, x, y, r) in enumerate(placed):
            assert r > 0.05
            assert min(x - r, y - r) > 0
            assert max(x + r, y + r) < 1
            for _, x2, y2, r2 in placed[:index]:
                # Boxes, not circles: they must not cut each other.
                assert max(abs(x - x2), abs(y - y2)) >= (r + r2) * 0.999


@pytest.mark.parametrize("colour", list(COLOURS))
@pytest.mark.parametrize("style", ["flat", "outlined", "painted", "shaded"])
def test_the_colour_named_is_the_colour_seen(colour: str, style: str) -> None:
    image = np.asarray(draw_scene(one_group(style, "beige", colour=colour, size="large")))
    seen = {name: int(near(image, name).sum()) for name in COLOURS}
    if style == "outlined" and colour != "black":
        seen.pop("black")
    # A large circle covers pi * 0.175^2 = 9.6 % of 16,384 pixels: 1,576. Shading and tint cost some of them.
    assert max(seen, key=seen.__getitem__) == colour
    assert seen[colour] > 600


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "tree"])
def test_as_many_things_as_counted(count: int, shape: str) -> None:
    image = np.asarray(draw_scene(one_group(shape=shape, count=count)))
    _, found = label(near(image, "red"), structure=np.ones((3, 3)))
    assert found == count


@pytest.mark.parametrize(
    ("relation", "axis", "sign"), [("left of", 1, -1), ("right of", 1, 1), ("above", 0, -1), ("below", 0, 1)]
)
def test_relation_places_the_first_group(relation: str, axis: int, sign: int) -> None:
    for layout in range(20):
        image = np.asarray(draw_scene(two_groups(relation, layout)))
        first, second = (np.argwhere(near(image, c))[:, axis] for c in ("red", "blue"))
        assert (first.mean() - second.mean()) * sign > 20
        assert (first.max() < second.min()) if sign < 0 else (first.min() > second.max())


@pytest.mark.parametrize("background", list(BACKGROUNDS))
def test_background_fills_most_of_the_picture(background: str) -> None:
    image = np.asarray(draw_scene(one_group("flat", background)))
    assert near(image, f"on {background}").mean() > 0.9


def test_sizes_and_styles_and_shapes_all_look_different() -> None:
    area = [near(np.asarray(draw_scene(one_group(size=s))), "red").sum() for s in ("small", "medium", "large")]
    assert area[0] * 1.5 < area[1]
    assert area[1] * 1.5 < area[2]
    pictures = [np.asarray(draw_scene(one_group(style)), dtype=float) for style in STYLES]
    pictures += [np.asarray(draw_scene(one_group(shape=shape)), dtype=float) for shape in SHAPES[1:]]
    for i, first in enumerate(pictures):
        for second in pictures[:i]:
            assert np.abs(first - second).mean() > 0.3


def test_outlines_lie_in_the_unit_square() -> None:
    assert tuple(outlines()) == SHAPES
    for parts in outlines().values():
        assert [role for role, _ in parts].count("body") == 1
        for _, corners in parts:
            assert corners.ndim == 2
            assert np.abs(corners).max() <= 1.2
