"""Near copies: every pair and no other, against all products; none where a backbone cannot tell images apart."""

from __future__ import annotations

import numpy as np
import pytest

from deltaclip.features.store import near
from deltaclip.features.store.near import COSINE, near_copies


def all_pairs(vectors):
    """Return the pairs above the cosine by all products in float64."""
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return np.argwhere(np.triu(unit @ unit.T > COSINE, 1))


def found(vectors, entries=None):
    return near_copies(lambda rows: vectors[rows], np.arange(len(vectors)) if entries is None else entries)


def moved(rng, vectors, cosine):
    """Return unit vectors at a cosine to the ones that are given."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    across = rng.standard_normal(unit.shape)
    across -= (across * unit).sum(axis=1, keepdims=True) * unit
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    return cosine * unit + np.sqrt(1 - cosine**2) * across


@pytest.mark.parametrize(("num", "dim"), [(8, 4), (50, 3), (700, 64), (2100, 32)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_as_all_products_say(num, dim, dtype):
    rng = np.random.default_rng(num)
    vectors = rng.standard_normal((num, dim)) + 0.5
    copies = max(1, num // 20)
    # Not so near the border that 16 bits decide.
    for place, cosine in enumerate((0.99991, 0.99989, 0.999999, 0.9995)):
        part = slice(place * copies, (place + 1) * copies)
        if part.stop <= num - copies:
            vectors[part] = 3 * moved(rng, vectors[-copies:], cosine)
    vectors = vectors.astype(dtype)
    pairs = found(vectors)
    assert len(pairs)
    np.testing.assert_array_equal(pairs, all_pairs(vectors))


def test_entries_need_not_be_all(monkeypatch):
    monkeypatch.setattr(near, "BLOCK", 7)  # several reads of some images each
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((60, 16)).astype(np.float32)
    vectors[40:50] = vectors[:10] + np.float32(1e-4)
    pairs = found(vectors, np.arange(0, 60, 5))
    assert pairs.tolist() == [[0, 40], [5, 45]]


def test_too_few_and_too_many(monkeypatch):
    vectors = np.ones((5, 4), dtype=np.float32)
    assert found(vectors[:0]).shape == found(vectors[:1]).shape == (0, 2)
    monkeypatch.setattr(near, "MAX_IMAGES", 4)
    assert found(vectors).shape == (0, 2)


def test_a_backbone_that_puts_all_images_side_by_side_tells_nothing():
    rng = np.random.default_rng(0)
    vectors = 1 + 1e-3 * rng.standard_normal((300, 64)).astype(np.float32)
    assert len(all_pairs(vectors)) == 300 * 299 // 2
    assert not len(found(vectors))
    assert not len(found(np.ones((300, 64), dtype=np.float16)))
