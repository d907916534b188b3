"""Damage is seen, grows with its strength, and the label follows the formula."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from deltaclip.features.scenes.damage import DAMAGES, WEIGHTS, Damage, damage_image, damage_words, quality_label
from deltaclip.features.scenes.draw import draw_scene, random_scene

IMAGES = [draw_scene(random_scene([31, i])) for i in range(12)]


def harm(kind: str, strength: float) -> float:
    """Mean absolute change of a pixel, in levels of 255, over several pictures."""
    damage = [Damage(kind=kind, strength=strength)]
    changes = [
        np.abs(np.asarray(damage_image(im, damage, i), dtype=float) - np.asarray(im, dtype=float)).mean()
        for i, im in enumerate(IMAGES)
    ]
    return float(np.mean(changes))


@pytest.mark.parametrize("kind", DAMAGES)
def test_change_grows_with_strength(kind: str) -> None:
    changes = [harm(kind, strength) for strength in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert changes[0] == 0
    assert all(a < b for a, b in itertools.pairwise(changes))
    # The weakest, a warp, moves edges only: 2 levels on the mean of a picture that is mostly background.
    assert changes[-1] > 2


@pytest.mark.parametrize("size", [16, 33, 128])
@pytest.mark.parametrize("kind", DAMAGES)
def test_size_and_mode_stay_and_the_seed_decides(kind: str, size: int) -> None:
    image = draw_scene(random_scene(4), size)
    damage = [Damage(kind=kind, strength=0.8)]
    damaged = damage_image(image, damage, 1)
    assert (damaged.mode, damaged.size) == ("RGB", (size, size))
    assert damaged.tobytes() == damage_image(image, damage, 1).tobytes()
    if kind in {"warp", "colours", "noise"}:
        assert damaged.tobytes() != damage_image(image, damage, 2).tobytes()


def test_order_of_the_list_does_not_matter() -> None:
    damages = [Damage(kind=kind, strength=0.4) for kind in DAMAGES]
    assert damage_image(IMAGES[0], damages, 1).tobytes() == damage_image(IMAGES[0], damages[::-1], 1).tobytes()


def test_label_formula_recomputed() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        damages = [Damage(kind=str(k), strength=float(rng.random())) for k in rng.choice(DAMAGES, 3, replace=False)]
        table = {"blur": 0.85, "low_resolution": 0.8, "noise": 0.75, "warp": 0.7, "jpeg": 0.6, "colours": 0.55}
        expected = 1.0
        for d in damages:
            expected -= expected * table[d.kind] * d.strength
        assert quality_label(damages) == pytest.approx(expected, abs=1e-12)
        assert 0 <= quality_label(damages) <= 1
    assert quality_label([]) == 1


def test_more_damage_lower_label() -> None:
    for kind in DAMAGES:
        labels = [quality_label([Damage(kind=kind, strength=s)]) for s in (0, 0.2, 0.6, 1)]
        assert all(a > b for a, b in itertools.pairwise(labels))
        assert labels[-1] == pytest.approx(1 - WEIGHTS[kind])
    both = [Damage(kind="blur", strength=0.5), Damage(kind="noise", strength=0.5)]
    assert quality_label(both) < min(quality_label(both[:1]), quality_label(both[1:]))


def test_words_name_what_can_be_seen() -> None:
    damages = [Damage(kind="noise", strength=0.5), Damage(kind="blur", strength=0.9), Damage(kind="jpeg", strength=0.1)]
    assert damage_words(damages) == ["it is blurry", "it is noisy"]
    assert damage_words([]) == []
