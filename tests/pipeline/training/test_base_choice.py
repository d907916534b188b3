"""Which base is taken: shares against scipy, what noise looks like, and which candidates a cache offers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import spearmanr

from deltaclip.pipeline.training.base_choice import (
    FEW_GROUPS,
    MIXTURE,
    MOST_MEMBERS,
    choose,
    figures,
    finalists,
    image_candidates,
    judged_by,
    pair_candidates,
    plain_kernel,
    shares,
)


def problem(seed, *, num_rows=300, noise=(0.3, 0.5, 0.8, 2.0), groups=60):
    """Labels in [0, 1], and predictions that are off by noise of their own."""
    rng = np.random.default_rng(seed)
    label = rng.uniform(0, 1, num_rows)
    said = np.stack([label + 0.3 * each * rng.standard_normal(num_rows) for each in noise], axis=1)
    return said, label, rng.integers(groups, size=num_rows)


def by_name(said):
    return {f"c{place}": column for place, column in enumerate(said.T)}


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_those_of_least_squares_on_the_simplex(seed):
    said, label, _ = problem(seed)
    found = shares(said, label)
    judge = minimize(
        lambda w: np.square(said @ w - label).mean(),
        np.full(4, 0.25),
        jac=lambda w: 2 * said.T @ (said @ w - label) / len(label),
        method="SLSQP",
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    kept = judge.x >= 0.05
    # A share below a twentieth is dropped, and the others are fitted without it.
    again = minimize(
        lambda w: np.square(said[:, kept] @ w - label).mean(),
        np.full(kept.sum(), 1 / kept.sum()),
        method="SLSQP",
        bounds=[(0, 1)] * int(kept.sum()),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert (found >= 0).all()
    assert found[kept] == pytest.approx(again.x, abs=1e-4)
    assert not found[~kept].any()


def test_shares_of_equal_and_of_constant_columns():
    said, label, _ = problem(0)
    twice = shares(said[:, [0, 0]], label)
    assert twice.sum() == pytest.approx(1)
    assert said[:, [0, 0]] @ twice == pytest.approx(said[:, 0])
    assert shares(np.full((20, 2), 0.5), np.full(20, 0.5)).sum() == pytest.approx(1)
    # Labels that all candidates are far from: still shares, that sum to 1.
    assert shares(said + 50, label).sum() == pytest.approx(1, abs=1e-9)


def test_a_mixture_is_taken_where_it_is_better_and_only_there():
    said, label, groups = problem(1, noise=(0.5, 0.5))
    both = choose(by_name(said), label, groups, seed=0)
    assert set(both.shares) == {"c0", "c1"}
    assert both.figures[MIXTURE]["rmse"] < min(both.figures[name]["rmse"] for name in ("c0", "c1"))
    said, label, groups = problem(1, noise=(0.05, 3.0))
    assert choose(by_name(said), label, groups, seed=0).shares == {"c0": 1.0}
    alone = choose(by_name(said[:, :1]), label, groups, seed=0)
    assert (alone.shares, list(alone.figures)) == ({"c0": 1.0}, ["c0"])


def test_the_figure_of_a_mixture_is_out_of_fold():
    """Twenty candidates of noise: shares that saw the rows make some of it fit, which the figure must not tell."""
    seen, told = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        label = rng.uniform(0, 1, 60)
        said = 0.5 + 0.3 * rng.standard_normal((60, 20))
        found = choose(by_name(said), label, rng.integers(20, size=60), seed=seed)
        seen.append(spearmanr(said @ shares(said, label), label)[0])
        told.append(found.figures[MIXTURE]["srocc"])
    assert np.mean(seen) > 0.3  # what it would be otherwise
    assert abs(np.mean(told)) < 4 / np.sqrt(59 * 10)  # 1 / sqrt(n - 1) is the SD of one


def test_rows_of_one_group_never_see_their_own_shares():
    """Each group has a candidate that says its labels; out of fold nobody knows which one is right elsewhere."""
    label = np.tile(np.linspace(0, 1, 10), 5)
    groups = np.repeat(np.arange(5), 10)
    said = np.stack([np.where(groups == each, label, 1 - label) for each in range(5)], axis=1)
    found = choose(by_name(said), label, groups, seed=3)
    # Shares of four groups give nothing to the fifth's own candidate, which alone is right there.
    assert found.figures[MIXTURE]["srocc"] < 0
    assert found.shares.keys() <= set(by_name(said))


@pytest.mark.parametrize(("num_groups", "by"), [(FEW_GROUPS, "rmse"), (FEW_GROUPS + 1, "srocc"), (2, "rmse")])
def test_few_groups_are_judged_by_squared_error(num_groups, by):
    """One ranks better, the other is nearer: which is taken depends on how many groups there are."""
    assert judged_by(num_groups) == by
    rng = np.random.default_rng(0)
    groups = np.resize(np.arange(num_groups), 1000)
    label = rng.uniform(0.45, 0.55, 1000)
    said = {"ranks": label + 0.4, "near": label + 0.05 * rng.standard_normal(1000)}
    found = choose(said, label, groups, seed=0)
    assert found.by == by
    assert found.shares == {"near" if by == "rmse" else "ranks": 1.0}


def test_figures_are_scipys():
    said, label, _ = problem(4)
    found = figures(said[:, 0], label)
    assert found["srocc"] == pytest.approx(spearmanr(said[:, 0], label)[0], abs=1e-12)
    assert found["rmse"] == pytest.approx(np.sqrt(np.square(said[:, 0] - label).mean()))
    for nothing in (np.full(300, 0.5), said[:2, 0]):
        assert math.isnan(figures(nothing, label[: len(nothing)])["srocc"])


def test_a_candidate_that_says_one_thing_never_wins_by_rank():
    said, label, groups = problem(5, noise=(30.0,), groups=400)
    found = choose({"flat": np.full(300, label.mean()), "noisy": said[:, 0]}, label, groups, seed=0)
    assert found.by == "srocc"
    assert found.figures["flat"]["srocc"] != found.figures["flat"]["srocc"]
    assert set(found.shares) != {"flat"}
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["left_out"]["flat"]["srocc"] is None


def test_finalists_are_the_best_and_those_of_the_mixture():
    said, label, _ = problem(6, noise=(0.5, 0.5, 0.5, 0.5, 5.0))
    named = by_name(said)
    found = finalists(named, label, by="rmse")
    assert len(found) == MOST_MEMBERS
    assert found[0] == min(named, key=lambda name: figures(named[name], label)["rmse"])
    assert "c4" not in found
    assert finalists({"a": said[:, 0]}, label, by="srocc") == ["a"]


ALL = ("center", "prompt", "cosine", "anchors", "flip", "stages", "statistics", "tiles")


@pytest.mark.parametrize("number", range(2 ** (len(ALL) - 3)))
def test_candidates_of_any_cache_are_told_apart_and_see_nothing_twice(number):
    """Every choice of views: no candidate twice, by inputs or by name, and none that needs what is not there."""
    inputs = [*ALL[:3], *(name for place, name in enumerate(ALL[3:]) if number >> place & 1)]
    for candidates in (
        image_candidates(inputs),
        pair_candidates(inputs, has_score=True),
        pair_candidates(inputs, has_score=False),
    ):
        assert len({one.name for one in candidates}) == len(candidates) == len(set(candidates))
        for one in candidates:
            assert set(one.inputs) <= set(inputs)
            assert len(set(one.inputs)) == len(one.inputs)
            assert one.with_score or one.score_weight == 0
    assert not {name for one in image_candidates(inputs) for name in one.inputs} & {"prompt", "cosine"}
    assert any(one.kind == "line" and not one.inputs for one in pair_candidates(inputs, has_score=False))
    assert not any(one.with_score for one in pair_candidates(inputs, has_score=False))


def test_what_candidates_are_called():
    found = [one.name for one in image_candidates(["center", "prompt", "cosine", "stages", "statistics"])]
    assert found == [
        "ridge on center",
        "ridge on stages",
        "ridge on statistics",
        "kernel on center",
        "kernel on stages",
        "kernel on statistics",
        "kernel on stages + statistics",
        "kernel on center + stages + statistics",
    ]
    pairs = [one.name for one in pair_candidates(["center", "prompt", "cosine"], has_score=True)]
    assert pairs == [
        "cosine line",
        "ridge on score",
        "ridge on center + prompt + score",
        "kernel on center + prompt + score",
    ]
    assert plain_kernel("stages", sees_pair=False, has_score=True).name == "kernel on stages"
    assert plain_kernel("stages", sees_pair=True, has_score=True).name == "kernel on stages + prompt + score"
