"""The margin of a head: against intervals of simulated truth, and what it says where nothing can be judged."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from deltaclip.pipeline.scoring.agreement import srocc
from deltaclip.pipeline.scoring.verdict import Margin, margin, mean_margin


def draw(seed, *, num_groups=60, rows_of_group=5, noise=(0.4, 0.4)):
    """Labels, and two predictions of them, with effects of groups that both share."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(num_groups), rows_of_group)
    label = rng.normal(size=num_groups)[group] + rng.normal(size=group.size)
    first, second = (
        label + size * (rng.normal(size=num_groups)[group] + rng.normal(size=group.size)) for size in noise
    )
    return first, second, label, group


def test_the_difference_is_that_of_srocc_and_the_interval_holds_it():
    first, second, label, group = draw(0, noise=(0.3, 0.9))
    found = margin(first, second, label, groups=group)
    assert found.difference == srocc(first, label) - srocc(second, label)
    assert found.lo < found.difference < found.hi
    assert found.outcome == "clear"
    mirrored = margin(second, first, label, groups=group)
    assert (mirrored.difference, mirrored.outcome) == (-found.difference, "below")


def test_equal_heads_are_told_apart_as_rarely_as_the_level_says():
    # 5 % of 200 draws are 10, SD 3; the bootstrap over 60 groups errs by some more.
    outcomes = [margin(*draw(seed, noise=(0.6, 0.6))[:3], groups=draw(seed)[3]).outcome for seed in range(200)]
    assert 180 <= outcomes.count("unclear") <= 199


def test_without_another_predictor_it_is_compared_with_chance():
    first, _, label, group = draw(1)
    found = margin(first, None, label, groups=group)
    assert found.difference == srocc(first, label)
    assert found.outcome == "clear"
    noise = np.random.default_rng(0).normal(size=label.size)
    assert margin(noise, None, label, groups=group).outcome == "unclear"


def test_rows_without_the_other_prediction_are_left_out():
    first, second, label, group = draw(2)
    second[::3] = np.nan
    known = np.isfinite(second)
    found = margin(first, second, label, groups=group)
    assert found.difference == pytest.approx(srocc(first[known], label[known]) - srocc(second[known], label[known]))


@pytest.mark.parametrize("change", [{"groups": np.zeros(300, dtype=int)}, {"label_M": np.full(300, np.nan)}])
def test_what_cannot_be_judged_is_said(change):
    first, second, label, group = draw(3)
    found = margin(**{"predicted_M": first, "other_M": second, "label_M": label, "groups": group} | change)
    assert found.outcome == "unjudged"
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["lo"] is None


def test_two_rows_cannot_be_judged():
    assert margin([0.1, 0.2], [0.2, 0.1], [0.0, 1.0], groups=[0, 1]).outcome == "unjudged"


def test_the_mean_of_one_repeat_has_no_interval():
    found = mean_margin([Margin(difference=0.2, lo=0.1, hi=0.3).to_json(), None], [(10, 80), (10, 80)])
    assert found.difference == 0.2
    assert math.isnan(found.lo)
    assert found.outcome == "unjudged"
