"""Prompts for a scene: many ways to say the same; knows scenes, not pixels or labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.features.scenes.draw import NOUNS, OPPOSITE, Group, Scene

if TYPE_CHECKING:
    from collections.abc import Sequence


NUMBERS = ("no", "one", "two", "three", "four")
SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("",), "large": ("large", "big", "huge")}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
OPENINGS: dict[str, tuple[str, ...]] = {
    "flat": ("a flat picture of", "a flat drawing of", "clip art of"),
    "outlined": ("an outlined drawing of", "a cartoon of", "an outlined picture of"),
    "sketch": ("a sketch of", "a pencil sketch of", "a scribble of"),
    "painted": ("a painting of", "a painted picture of", "a brush painting of"),
    "shaded": ("a shaded picture of", "a shaded drawing of", "a glossy picture of"),
}
ENDINGS: dict[str, tuple[str, ...]] = {
    "flat": (", flat style", ", in flat colours"),
    "outlined": (", outlined style", ", with thick outlines"),
    "sketch": (", sketch style", ", as a pencil sketch"),
    "painted": (", painted style", ", as a painting"),
    "shaded": (", shaded style", ", with glossy shading"),
}
NEUTRAL_OPENINGS = ("", "", "a picture of", "a drawing of", "an image of", "an illustration of")


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A prompt; shape, colour, count and relation it always gives, style and background it may leave out."""

    text: str
    says_style: bool
    says_background: bool


def with_article(words: str) -> str:
    """Return the words with `a` or `an` before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def group_words(group: Group, article: str = "a", size_word: str | None = None) -> str:
    """Return for instance `three small red circles` or, for a single thing, `a blue square`."""
    size = SIZE_WORDS[group.size][0] if size_word is None else size_word
    noun = NOUNS[group.shape][group.count > 1]
    words = [w for w in (size, group.colour, noun) if w]
    if group.count > 1:
        return " ".join([NUMBERS[group.count], *words])
    return with_article(" ".join(words)) if article == "a" else " ".join([article, *words])


def write_caption(scene: Scene, seed: int | Sequence[int]) -> Caption:
    """Return one of the many ways to describe `scene`; the same seed gives the same way for every scene.

    The random draws do not depend on the scene, so a scene edited in one attribute gets the same sentence
    with only that attribute changed: a hard negative.
    """
    rng = np.random.default_rng(seed)
    coins = rng.random(4)
    picks = rng.integers(2**16, size=8)

    def pick(words: tuple[str, ...], slot: int) -> str:
        return words[int(picks[slot]) % len(words)]

    article = "one" if coins[0] < 0.3 else "a"
    parts = [group_words(g, article, pick(SIZE_WORDS[g.size], slot)) for slot, g in enumerate(scene.groups)]
    body = parts[0]
    if len(parts) == 2:
        swap = coins[1] < 0.3
        relation = OPPOSITE[scene.relation] if swap else scene.relation
        first, second = parts[::-1] if swap else parts
        body = f"{first} {pick(RELATION_WORDS[relation], 2)} {second}"
    says_background, says_style = bool(coins[2] < 0.4), bool(coins[3] < 0.75)
    if says_background:
        body += f" on a {scene.background} background"
    if not says_style:
        text = f"{pick(NEUTRAL_OPENINGS, 3)} {body}".strip()
    elif coins[3] < 0.4:
        text = f"{pick(OPENINGS[scene.style], 4)} {body}"
    else:
        text = f"{pick(NEUTRAL_OPENINGS, 3)} {body}".strip() + pick(ENDINGS[scene.style], 5)
    return Caption(text=text, says_style=says_style, says_background=says_background)
