"""Pictures that miss a prompt by a known amount, and what is wrong with them in words.

Knows scenes and captions, never pixels.

Consistency label. Every mistake of the picture multiplies the label by what is left of the prompt:

    consistency = product over mistakes of (1 - weight)

A product, because a second mistake in a picture that is already wrong annoys less than the first, and because
the label then never leaves [0, 1]. The weights follow what people mind most in text-to-image ratings:

    missing    0.60   a thing asked for is not there at all: everything said about it is wrong
    shape      0.50   another thing stands there: the noun is wrong, its colour and number may be right
    colour     0.40   the right thing in the wrong colour
    count      0.20 for one too many or too few, 0.15 more for each further one (at most 0.50)
    relation   0.30   the right things in the wrong places
    style      0.25   the right scene drawn otherwise
    background 0.20   named last, seen last
    other      0.95   a whole other scene, which shares no shape and no colour with the prompt
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.features.scenes.captions import NUMBERS, RELATION_WORDS, Caption, group_words, with_article
from deltaclip.features.scenes.draw import (
    BACKGROUNDS,
    MAX_COUNT,
    MAX_LARGE,
    NOUNS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    STYLES,
    Group,
    Scene,
    random_scene,
    visible_colours,
    with_group,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.random import Generator

WEIGHTS: dict[str, float] = {
    "missing": 0.60,
    "shape": 0.50,
    "colour": 0.40,
    "count": 0.20,
    "relation": 0.30,
    "style": 0.25,
    "background": 0.20,
    "other": 0.95,
}
COUNT_STEP = 0.15
COUNT_MOST = 0.50
# In the order in which a scene is edited, see edit_scene.
ATTRIBUTES: tuple[str, ...] = ("missing", "colour", "count", "relation", "shape", "style", "background")

STYLE_NOUNS = {
    "flat": "a flat picture",
    "outlined": "an outlined drawing",
    "sketch": "a sketch",
    "painted": "a painting",
    "shaded": "a shaded picture",
}


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One thing a picture gets wrong: its `attribute` (a key of WEIGHTS), its weight, words for it."""

    attribute: str
    weight: float
    words: str


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """The scene that is drawn instead of the one the prompt asks for, and its mistakes (empty if it fits)."""

    scene: Scene
    mistakes: tuple[Mistake, ...]

    @property
    def consistency(self) -> float:
        """The label in [0, 1]: product of (1 - weight) over the mistakes."""
        return consistency_label(self.mistakes)

    @property
    def explanation(self) -> str:
        """One clause per mistake; empty if nothing is wrong."""
        return join_clauses([m.words for m in self.mistakes])


def consistency_label(mistakes: Sequence[Mistake]) -> float:
    """Return the product of (1 - weight) over the mistakes, in [0, 1]; see the head of this file."""
    return math.prod(1.0 - m.weight for m in mistakes)


def count_weight(asked: int, drawn: int) -> float:
    """Return the weight of a wrong number: 0.20 if off by one, 0.15 more per further step, at most 0.50."""
    off = abs(asked - drawn)
    return 0.0 if off == 0 else min(COUNT_MOST, WEIGHTS["count"] + COUNT_STEP * (off - 1))


def join_clauses(parts: Sequence[str]) -> str:
    """Return one sentence of all clauses, which have commas of their own: `a; b; c`."""
    return "; ".join(parts)


def _things(group: Group) -> str:
    return NOUNS[group.shape][group.count > 1]


def _be(group: Group) -> str:
    return "are" if group.count > 1 else "is"


def _edit_missing(scene: Scene, rng: Generator) -> tuple[Scene, Mistake]:
    gone = int(rng.integers(2))
    group = scene.groups[gone]
    words = f"the {group.colour} {_things(group)} {_be(group)} missing"
    # The other group keeps its half of the picture, so that a hole is left.
    kept = scene.groups[1 - gone]
    left = replace(scene, groups=(kept,), relation=OPPOSITE[scene.relation] if gone == 0 else scene.relation)
    return left, Mistake(attribute="missing", weight=WEIGHTS["missing"], words=words)


def _edit_shape(scene: Scene, rng: Generator) -> tuple[Scene, Mistake]:
    index = int(rng.integers(len(scene.groups)))
    group = scene.groups[index]
    shape = str(rng.choice([s for s in SHAPES if s not in {g.shape for g in scene.groups}]))
    wrong = replace(group, shape=shape)
    drawn = _things(wrong) if wrong.count > 1 else with_article(_things(wrong))
    words = f"the {_things(group)} {_be(group)} drawn as {drawn}"
    return with_group(scene, index, wrong), Mistake(attribute="shape", weight=WEIGHTS["shape"], words=words)


def _edit_colour(scene: Scene, rng: Generator) -> tuple[Scene, Mistake]:
    index = int(rng.integers(len(scene.groups)))
    group = scene.groups[index]
    used = {g.colour for g in scene.groups}
    colour = str(rng.choice([c for c in visible_colours(scene.background) if c not in used]))
    words = f"the {_things(group)} {_be(group)} {colour}, not {group.colour}"
    wrong = with_group(scene, index, replace(group, colour=colour))
    return wrong, Mistake(attribute="colour", weight=WEIGHTS["colour"], words=words)


def _edit_count(scene: Scene, rng: Generator) -> tuple[Scene, Mistake]:
    index = int(rng.integers(len(scene.groups)))
    group = scene.groups[index]
    most = MAX_LARGE if group.size == "large" else MAX_COUNT
    count = int(rng.choice([n for n in range(1, most + 1) if n != group.count]))
    wrong = replace(group, count=count)
    words = f"there {_be(wrong)} {NUMBERS[count]} {_things(wrong)}, not {NUMBERS[group.count]}"
    mistake = Mistake(attribute="count", weight=count_weight(group.count, count), words=words)
    return with_group(scene, index, wrong), mistake


def _edit_relation(scene: Scene, rng: Generator) -> tuple[Scene, Mistake]:
    others = [r for r in RELATIONS if r != scene.relation]
    # The opposite place in one case of two, else one of the two others.
    others.remove(OPPOSITE[scene.relation])
    relation = OPPOSITE[scene.relation] if rng.random() < 0.5 else str(rng.choice(others))
    first, second = scene.groups
    now, asked = RELATION_WORDS[relation][0], RELATION_WORDS[scene.relation][0]
    words = f"the {_things(first)} {_be(first)} {now} the {_things(second)}, not {asked} them"
    if second.count == 1:
        words = words[: -len("them")] + "it"
    mistake = Mistake(attribute="relation", weight=WEIGHTS["relation"], words=words)
    return replace(scene, relation=relation), mistake


def _edit_style(scene: Scene, rng: Generator) -> tuple[Scene, Mistake]:
    style = str(rng.choice([s for s in STYLES if s != scene.style]))
    words = f"it is {STYLE_NOUNS[style]}, not {STYLE_NOUNS[scene.style]}"
    return replace(scene, style=style), Mistake(attribute="style", weight=WEIGHTS["style"], words=words)


def _edit_background(scene: Scene, rng: Generator) -> tuple[Scene, Mistake]:
    used = {g.colour for g in scene.groups}
    free = [b for b in BACKGROUNDS if b != scene.background and used <= set(visible_colours(b))]
    background = str(rng.choice(free))
    words = f"the background is {background}, not {scene.background}"
    mistake = Mistake(attribute="background", weight=WEIGHTS["background"], words=words)
    return replace(scene, background=background), mistake


_EDITS: dict[str, Callable[[Scene, Generator], tuple[Scene, Mistake]]] = {
    "missing": _edit_missing,
    "shape": _edit_shape,
    "colour": _edit_colour,
    "count": _edit_count,
    "relation": _edit_relation,
    "style": _edit_style,
    "background": _edit_background,
}


def possible_mistakes(scene: Scene, caption: Caption) -> list[str]:
    """Return the attributes that can be wrong so that the prompt no longer fits: only what it speaks of."""
    allowed = {
        "missing": len(scene.groups) == 2,
        "relation": len(scene.groups) == 2,
        "style": caption.says_style,
        "background": caption.says_background,
    }
    return [a for a in ATTRIBUTES if allowed.get(a, True)]


def edit_scene(scene: Scene, attributes: Sequence[str], seed: int | Sequence[int]) -> Mismatch:
    """Return `scene` with every attribute of `attributes` (each of ATTRIBUTES, at most once) made wrong.

    What is missing goes first, and later edits fall on what is left; `relation` is skipped when one group is
    left. Shape comes after colour, count and relation, so that their words still use the prompt's own noun.
    """
    rng = np.random.default_rng(seed)
    mistakes = []
    for attribute in ATTRIBUTES:
        if attribute not in attributes or (attribute == "relation" and len(scene.groups) == 1):
            continue
        scene, mistake = _EDITS[attribute](scene, rng)
        mistakes.append(mistake)
    return Mismatch(scene=scene, mistakes=tuple(mistakes))


def mismatch(scene: Scene, caption: Caption, num_mistakes: int, seed: int | Sequence[int]) -> Mismatch:
    """Return `scene` with `num_mistakes` different attributes wrong, or as many as the prompt speaks of."""
    rng = np.random.default_rng(seed)
    possible = possible_mistakes(scene, caption)
    chosen = rng.permutation(possible)[:num_mistakes]
    return edit_scene(scene, [str(a) for a in chosen], int(rng.integers(2**31)))


def other_scene(scene: Scene, seed: int | Sequence[int]) -> Mismatch:
    """Return a whole other scene, which shares no shape and no colour with `scene`."""
    rng = np.random.default_rng(seed)
    shapes, colours = {g.shape for g in scene.groups}, {g.colour for g in scene.groups}
    while True:
        other = random_scene(int(rng.integers(2**31)))
        if all(g.shape not in shapes and g.colour not in colours for g in other.groups):
            shown = " and ".join(group_words(g) for g in other.groups)
            words = f"it shows something else: {shown}"
            return Mismatch(scene=other, mistakes=(Mistake(attribute="other", weight=WEIGHTS["other"], words=words),))
