"""Likeness: distances against brute force, flags of fresh groups and of strange rows, parts that are missing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from deltaclip.pipeline.scoring.likeness import LANDMARKS, MIN_GROUPS, NEAREST, _distance, fit_likeness


def drawn(rng, num_groups, *, per_group=8, width=96, rank=12):
    """Return unit vectors whose groups share most of what they are, and the groups."""
    plane = np.random.default_rng(0).standard_normal((rank, width))
    groups_N = np.repeat(np.arange(num_groups), per_group)
    own_NR = rng.standard_normal((num_groups, rank))[groups_N] + 0.5 * rng.standard_normal((len(groups_N), rank))
    vector_NW = own_NR @ plane + 0.3 * rng.standard_normal((len(groups_N), width)) + 5
    return (vector_NW / np.linalg.norm(vector_NW, axis=1, keepdims=True)).astype(np.float32), groups_N


def test_distance_is_the_mean_to_the_nearest_of_other_groups():
    rng = np.random.default_rng(1)
    point_NC, mark_LC = (rng.standard_normal((size, 5)).astype(np.float32) for size in (40, 30))
    own_N, mark_L = rng.integers(0, 6, 40), rng.integers(0, 6, 30)
    expected_NL = cdist(point_NC.astype(np.float64), mark_LC.astype(np.float64))
    assert _distance(point_NC, mark_LC) == pytest.approx(np.sort(expected_NL, axis=1)[:, :NEAREST].mean(axis=1))
    expected_NL[own_N[:, None] == mark_L] = np.inf
    found_N = _distance(point_NC, mark_LC, own_N=own_N, mark_L=mark_L)
    assert found_N == pytest.approx(np.sort(expected_NL, axis=1)[:, :NEAREST].mean(axis=1))
    assert np.isnan(_distance(point_NC, mark_LC, own_N=np.zeros(40, int), mark_L=np.zeros(30, int))).all()


def test_one_in_a_hundred_rows_of_fresh_groups_is_flagged():
    shares = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        vector_NW, groups_N = drawn(rng, 150)
        found = fit_likeness({"center": vector_NW}, groups_N, each={"center": False})
        fresh_NW, _ = drawn(rng, 150)
        ratio_N, part_N = found.judge({"center": found.parts["center"].coordinates(fresh_NW)})
        assert set(part_N) == {0}
        shares.append((ratio_N > 1).mean())
    # 20 draws of 150 groups: the share of a draw has an SD of about .007.
    assert 0.004 < np.mean(shares) < 0.018


def test_strange_rows_are_flagged_and_the_part_is_named():
    rng = np.random.default_rng(2)
    vector_NW, groups_N = drawn(rng, 100)
    other_NW = np.abs(rng.standard_normal((800, 6))) * [1, 10, 100, 1, 1, 0] + [0, 0, 0, 0, 0, 3]
    vectors = {"center": vector_NW, "statistics": other_NW.astype(np.float32)}
    found = fit_likeness(vectors, groups_N, each={"center": False, "statistics": True})
    strange = {
        "center": rng.standard_normal((40, 96)) / np.sqrt(96),
        "statistics": np.tile([5.0, 5, 5, 5, 5, 2.9], (40, 1)),  # the last never was anything but 3
    }
    usual = {name: vector_NW[:40] for name, vector_NW in vectors.items()}
    for place, name in enumerate(vectors):
        rows = {**usual, name: strange[name]}
        ratio_N, part_N = found.judge({each: found.parts[each].coordinates(rows[each]) for each in rows})
        assert (ratio_N > 1).mean() > 0.95, name
        assert set(part_N[ratio_N > 1]) == {place}
    ratio_N, _ = found.judge({each: found.parts[each].coordinates(usual[each]) for each in usual})
    assert (ratio_N > 1).sum() <= 1  # rows of the training themselves


def test_parts_that_rows_lack_say_nothing():
    rng = np.random.default_rng(3)
    vector_NW, groups_N = drawn(rng, 60)
    prompt_NW = np.where(np.arange(480)[:, None] % 2, drawn(rng, 60)[0], np.nan)
    found = fit_likeness({"center": vector_NW, "prompt": prompt_NW}, groups_N, each={"center": False, "prompt": False})
    assert list(found.parts) == ["center", "prompt"]
    nothing = {"prompt": found.parts["prompt"].coordinates(np.full((3, 96), np.nan))}
    ratio_N, part_N = found.judge(nothing)
    assert (ratio_N.tolist(), part_N.tolist()) == ([0, 0, 0], [-1, -1, -1])
    both = {**nothing, "center": found.parts["center"].coordinates(vector_NW[:3])}
    alone = {"center": both["center"]}
    assert found.judge(both)[0] == pytest.approx(found.judge(alone)[0])
    rare = fit_likeness({"prompt": np.where(groups_N[:, None] == 7, 1.0, np.nan)}, groups_N, each={"prompt": False})
    assert rare is None


@pytest.mark.parametrize("num_groups", [10, 11, 30])
def test_few_groups_and_equal_rows_are_told_apart_too(num_groups):
    rng = np.random.default_rng(4)
    vector_NW, groups_N = drawn(rng, num_groups, per_group=1)
    found = fit_likeness({"center": vector_NW}, groups_N, each={"center": False})
    strange_NW = -vector_NW
    assert (found.judge({"center": found.parts["center"].coordinates(strange_NW)})[0] > 1).all()
    equal = fit_likeness({"center": np.ones((12, 4))}, np.arange(12), each={"center": False})
    for vector_NW, is_flagged in ((np.ones((1, 4)), False), (np.eye(4)[:1], True)):
        (ratio,), _ = equal.judge({"center": equal.parts["center"].coordinates(vector_NW)})
        assert (ratio > 1) == is_flagged


def test_a_run_stays_small_whatever_the_rows_and_nine_groups_are_nothing():
    rng = np.random.default_rng(5)
    vector_NW, groups_N = drawn(rng, 500, width=40)
    part = fit_likeness({"center": vector_NW}, groups_N, each={"center": False}).parts["center"]
    assert part.landmark_LC.shape[0] == LANDMARKS
    few_N = np.arange(len(vector_NW)) % (MIN_GROUPS - 1)
    assert fit_likeness({"center": vector_NW}, few_N, each={"center": False}) is None
