"""Vectors in several parts, read like one array."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaclip.features.data.foreign import Vectors


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.data())
def test_parts_are_one_array(sizes, data):
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((size, 3)).astype(np.float16) for size in sizes]
    vectors, whole = Vectors(parts, [f"part {number}" for number in range(len(sizes))]), np.concatenate(parts)
    assert (len(vectors), vectors.width) == (len(whole), 3)
    if not len(whole):
        return
    rows = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=9)), dtype=np.int64)
    np.testing.assert_array_equal(vectors.take(rows), whole[rows])
    row = data.draw(st.integers(0, len(whole) - 1))
    part = next(number for number in range(len(sizes)) if row < sum(sizes[: number + 1]))
    assert vectors.place(row) == f"part {part}, row {row - sum(sizes[:part]) + 1}"
