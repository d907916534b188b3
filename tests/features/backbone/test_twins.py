"""Rotary positions in a twin: those of timm's own modules, made once for a shape."""

from __future__ import annotations

import pytest
import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed

from deltaclip.features.backbone.twins import MOST_SHAPES, twin_of

KINDS = {
    "cat": lambda: RotaryEmbeddingCat(16, in_pixels=False, feat_shape=None),
    "cat of one shape": lambda: RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[4, 5]),
    "dinov3": lambda: RotaryEmbeddingDinoV3(16, feat_shape=None),
}


def counted(rope):
    """The twin of a module, and the calls that its own function gets."""
    calls, real = [], type(rope).get_embed

    class Counted(type(rope)):
        def get_embed(self, shape=None, dtype=None):
            calls.append(shape)
            return real(self, shape, dtype=dtype)

    rope.__class__ = Counted
    return twin_of(torch.nn.Sequential(rope))[0], calls


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_the_modules_own_and_made_once(kind):
    rope = KINDS[kind]()
    expected = {shape: rope.get_embed(shape=shape) for shape in ((4, 5), (5, 4), (3, 3))}
    twin, calls = counted(rope)
    with torch.inference_mode():  # whoever is first
        for shape, wanted in expected.items():
            assert twin.get_embed(shape=list(shape)).equal(wanted)
    for shape, wanted in expected.items():
        kept = twin.get_embed(shape=shape)
        assert kept.equal(wanted)
        assert not kept.is_inference()
    assert len(calls) == len(expected)
    assert twin.get_embed(shape=(4, 5), dtype=torch.bfloat16).equal(expected[4, 5].bfloat16())
    if kind.endswith("shape"):
        assert twin.get_embed().equal(expected[4, 5])


def test_a_module_that_trains_makes_them_anew():
    twin, calls = counted(KINDS["dinov3"]())
    twin.train()
    for _ in range(2):
        twin.get_embed(shape=(3, 3))
    assert len(calls) == 2
    learned = RotaryEmbeddingMixed(16, depth=1, num_heads=2, feat_shape=[3, 3])
    assert "get_embed" not in vars(twin_of(torch.nn.Sequential(learned))[0])


def test_so_many_shapes_are_kept():
    twin, calls = counted(KINDS["dinov3"]())
    for side in range(1, MOST_SHAPES + 2):
        twin.get_embed(shape=(1, side))
    twin.get_embed(shape=(1, MOST_SHAPES + 1))
    assert len(calls) == MOST_SHAPES + 1
    twin.get_embed(shape=(1, 1))
    assert len(calls) == MOST_SHAPES + 2
