"""What is wrong is drawn, said and weighed: the label is recomputed here from the two scenes alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from deltaclip.features.scenes.captions import write_caption
from deltaclip.features.scenes.draw import Group, Scene, draw_scene, random_scene
from deltaclip.features.scenes.mismatch import (
    ATTRIBUTES,
    WEIGHTS,
    Mistake,
    consistency_label,
    count_weight,
    edit_scene,
    mismatch,
    other_scene,
    possible_mistakes,
)

SCENES = [random_scene([21, i]) for i in range(200)]
PAIRS = [s for s in SCENES if len(s.groups) == 2]
SCENE = Scene(
    groups=(Group(shape="circle", colour="red", count=3), Group(shape="square", colour="blue", count=1)),
    relation="left of",
    background="white",
    style="flat",
    layout=1,
)


def label_from_scenes(asked: Scene, drawn: Scene) -> float:
    """Weigh the differences of two scenes by the table in the documentation, written out once more."""
    left = 1.0
    if len(drawn.groups) < len(asked.groups):
        left *= 1 - 0.6
        first_is_gone = drawn.relation != asked.relation
        pairs = [(asked.groups[int(first_is_gone)], drawn.groups[0])]
    else:
        left *= 0.7 if asked.relation != drawn.relation else 1.0
        pairs = list(zip(asked.groups, drawn.groups, strict=True))
    for one, two in pairs:
        left *= 0.5 if one.shape != two.shape else 1.0
        left *= 0.6 if one.colour != two.colour else 1.0
        left *= {0: 1.0, 1: 0.8, 2: 0.65, 3: 0.5}[abs(one.count - two.count)]
    left *= 0.75 if asked.style != drawn.style else 1.0
    return left * (0.8 if asked.background != drawn.background else 1.0)


@pytest.mark.parametrize("num_mistakes", [0, 1, 2, 3, 4])
def test_label_is_that_of_the_two_scenes(num_mistakes: int) -> None:
    for i, scene in enumerate(SCENES):
        found = mismatch(scene, write_caption(scene, i), num_mistakes, i)
        assert found.consistency == pytest.approx(label_from_scenes(scene, found.scene), abs=1e-12)
        assert 0 <= found.consistency <= 1
        assert bool(found.mistakes) == bool(found.explanation) == (num_mistakes > 0)


def test_nothing_wrong() -> None:
    found = edit_scene(SCENE, [], 1)
    assert (found.scene, found.consistency, found.explanation) == (SCENE, 1.0, "")


def test_more_mistakes_lower_label() -> None:
    for scene, seed in itertools.product(PAIRS[:20], range(3)):
        caption = write_caption(scene, seed)
        labels = [
            mismatch(scene, caption, n, seed).consistency for n in range(len(possible_mistakes(scene, caption)) + 1)
        ]
        # Every label is a product over a larger set; a count that is off by three weighs more than one off by one.
        mean = [np.mean([mismatch(scene, caption, n, s).consistency for s in range(12)]) for n in range(len(labels))]
        assert labels[0] == 1
        assert all(a > b for a, b in itertools.pairwise(mean))


def test_adding_a_mistake_always_lowers_the_label() -> None:
    mistakes = [Mistake(attribute=a, weight=WEIGHTS[a], words=a) for a in WEIGHTS]
    for n in range(len(mistakes)):
        assert consistency_label(mistakes[: n + 1]) < consistency_label(mistakes[:n])
    assert WEIGHTS["other"] > WEIGHTS["missing"] > WEIGHTS["shape"] > WEIGHTS["colour"] > WEIGHTS["relation"]


def test_count_weight_grows_with_the_distance_and_stays_bounded() -> None:
    assert [count_weight(1, n) for n in (1, 2, 3, 4)] == pytest.approx([0, 0.2, 0.35, 0.5])
    assert count_weight(4, 1) == count_weight(1, 4)
    assert count_weight(1, 40) == 0.5


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_only_the_named_attribute_changes_and_the_picture_with_it(attribute: str) -> None:
    for seed, scene in enumerate(PAIRS[:40]):
        found = edit_scene(scene, [attribute], seed)
        assert [m.attribute for m in found.mistakes] == [attribute]
        assert found == edit_scene(scene, [attribute], seed)
        changed = {
            "missing": len(scene.groups) != len(found.scene.groups),
            "relation": len(found.scene.groups) == 2 and scene.relation != found.scene.relation,
            "style": scene.style != found.scene.style,
            "background": scene.background != found.scene.background,
        }
        if len(found.scene.groups) == 2:
            for name in ("shape", "colour", "count"):
                pairs = zip(scene.groups, found.scene.groups, strict=True)
                changed[name] = any(getattr(a, name) != getattr(b, name) for a, b in pairs)
        assert [a for a, is_changed in changed.items() if is_changed] == [attribute]
        before, after = (np.asarray(draw_scene(s, 64), dtype=float) for s in (scene, found.scene))
        assert np.abs(before - after).mean() > 0.3


@pytest.mark.parametrize(
    ("attribute", "pattern"),
    [
        ("colour", r"the (circles are \w+, not red|square is \w+, not blue)"),
        ("shape", r"the (circles are drawn as \w+|square is drawn as an? \w+)"),
        ("count", r"there (is|are) (one|two|three|four) (circles?|squares?), not (three|one)"),
        ("missing", r"the (red circles are|blue square is) missing"),
        ("relation", r"the circles are (to the right of|above|below) the square, not to the left of it"),
        ("style", r"it is an? [\w ]+, not a flat picture"),
        ("background", r"the background is [\w ]+, not white"),
    ],
)
def test_explanation_words(attribute: str, pattern: str) -> None:
    import re

    for seed in range(20):
        words = edit_scene(SCENE, [attribute], seed).explanation
        assert re.fullmatch(pattern, words), words


def test_only_what_the_prompt_says_can_be_wrong() -> None:
    for i, scene in enumerate(SCENES):
        caption = write_caption(scene, i)
        possible = possible_mistakes(scene, caption)
        assert ("style" in possible) == caption.says_style
        assert ("background" in possible) == caption.says_background
        assert ("missing" in possible) == ("relation" in possible) == (len(scene.groups) == 2)
        for attribute in possible:
            edited = edit_scene(scene, [attribute], i).scene
            assert write_caption(edited, i).text != caption.text


def test_other_scene_shares_nothing() -> None:
    for i, scene in enumerate(SCENES):
        found = other_scene(scene, i)
        assert not {g.shape for g in scene.groups} & {g.shape for g in found.scene.groups}
        assert not {g.colour for g in scene.groups} & {g.colour for g in found.scene.groups}
        assert found.consistency == pytest.approx(0.05)
        assert found.explanation.startswith("it shows something else: ")
