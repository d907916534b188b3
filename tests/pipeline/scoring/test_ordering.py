"""The share of pairs ordered rightly, against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deltaclip.pipeline.scoring.ordering import ordered_share, ordering


def test_ties_of_people_are_left_out_and_those_of_scores_count_half():
    difference, preferred = np.array([0.2, -0.1, 0.0, 0.3, -0.4]), np.array([1, 1, 0.8, 0.5, 0])
    assert ordered_share(difference, preferred) == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    found = ordering(difference, preferred, groups=np.array([1, 1, 2, 2, 3]))
    assert (found.n, found.ties) == (4, 1)
    assert 0 <= found.share_ci[0] <= found.share <= found.share_ci[1] <= 1


def test_nothing_to_order():
    assert math.isnan(ordered_share(np.array([1.0]), np.array([0.5])))
    found = ordering(np.array([1.0, 2.0]), np.array([1.0, 1.0]), groups=np.array([1, 1])).to_json()
    assert (found["share"], found["share_ci"]) == (1.0, [None, None])


def test_the_interval_is_over_groups():
    """Pairs of one prompt that agree are one observation: the interval is as wide as that of the prompts."""
    random = np.random.default_rng(0)
    right = np.repeat(random.random(50) < 0.7, 20)
    difference, preferred = np.where(right, 1.0, -1.0), np.ones(len(right))
    by_group = ordering(difference, preferred, groups=np.repeat(np.arange(50), 20)).share_ci
    by_pair = ordering(difference, preferred, groups=np.arange(len(right))).share_ci
    width = by_group[1] - by_group[0]
    assert width > 3 * (by_pair[1] - by_pair[0])
    assert width == pytest.approx(2 * 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 50), rel=0.15)
