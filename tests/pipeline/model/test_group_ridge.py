"""Ridge with groups left out, in closed form: against scikit-learn's fits that really leave rows out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from deltaclip.pipeline.model import group_ridge
from deltaclip.pipeline.model.group_ridge import DualRidge, GroupRidge, Refits, walk

STRENGTHS = tuple(4.0**k for k in range(-5, 4))
# Float64 systems of at most 60 unknowns, whose smallest eigenvalue is the strength, 1e-3 at least.
CLOSE = 1e-9


def problem(num_rows=60, width=7, seed=0, groups=15):
    """Features off their zero, labels off theirs, and groups of 1 to 9 rows, some of one."""
    rng = np.random.default_rng(seed)
    phi = rng.standard_normal((num_rows, width)) * rng.uniform(0.1, 2, width) + 3
    y = np.sin(phi[:, 0]) + 0.5 * rng.standard_normal(num_rows) + 10
    code = np.sort(rng.choice(groups, size=num_rows, p=rng.dirichlet(np.ones(groups))))
    return phi, y, rng.permutation(np.append(code[:-2], [groups, groups + 1]))


def ridge_of(phi, y, groups):
    return GroupRidge(torch.from_numpy(phi), torch.from_numpy(y), groups)


@pytest.mark.parametrize("width", [1, 7, 59, 60, 90])
@pytest.mark.parametrize("strength", [1e-3, 0.3, 50.0])
def test_a_fit_and_its_left_out_rows_are_scikit_learns(width, strength):
    phi, y, groups = problem(width=width, seed=width)
    assert (np.unique(groups, return_counts=True)[1] == 1).sum() >= 2
    solved = ridge_of(phi, y, groups).solve(strength)
    judge = Ridge(alpha=strength).fit(phi, y)  # its intercept is not penalised
    assert solved.w_L.numpy() == pytest.approx(judge.coef_, abs=CLOSE)
    assert float(solved.intercept) == pytest.approx(judge.intercept_, abs=1e-8)
    assert solved.own_M.numpy() == pytest.approx(judge.predict(phi), abs=CLOSE)
    new = np.random.default_rng(1).standard_normal((5, width))
    assert solved.say(torch.from_numpy(new)).numpy() == pytest.approx(judge.predict(new), abs=1e-8)
    for group in np.unique(groups):
        out = groups == group
        expected = Ridge(alpha=strength).fit(phi[~out], y[~out]).predict(phi[out])
        assert solved.left_out_M.numpy()[out] == pytest.approx(expected, abs=1e-8), group


def test_two_groups_of_which_one_has_a_single_row():
    phi, y, _ = problem(num_rows=9, width=3)
    groups = np.array([0] * 8 + [1])
    left_out = ridge_of(phi, y, groups).solve(0.1).left_out_M.numpy()
    # Without the eight nothing but the one row's label is left, whatever the features.
    assert left_out[:8] == pytest.approx(np.full(8, y[8]), abs=1e-8)
    expected = Ridge(alpha=0.1).fit(phi[:8], y[:8]).predict(phi[8:])
    assert left_out[8:] == pytest.approx(expected, abs=CLOSE)


def test_blocks_change_nothing(monkeypatch):
    phi, y, groups = problem(num_rows=300, groups=120)
    whole = ridge_of(phi, y, groups).solve(0.1).left_out_M
    monkeypatch.setattr(group_ridge, "_BLOCK_ENTRIES", 700)  # one to two groups at a time
    assert ridge_of(phi, y, groups).solve(0.1).left_out_M.numpy() == pytest.approx(whole.numpy(), abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("first", [STRENGTHS[0], STRENGTHS[4], STRENGTHS[-1]])
def test_no_neighbour_of_the_best_strength_has_less_error(seed, first):
    phi, y, groups = problem(width=20, seed=seed)
    best = ridge_of(phi, y, groups).best(STRENGTHS, first=first)
    errors = []
    for strength in STRENGTHS:
        left_out = np.empty(len(y))
        for group in np.unique(groups):
            out = groups == group
            left_out[out] = Ridge(alpha=strength).fit(phi[~out], y[~out]).predict(phi[out])
        errors.append(np.square(left_out - y).mean())
    here = STRENGTHS.index(best.strength)
    assert errors[here] == min(errors[max(0, here - 1) : here + 2])
    assert errors[here] <= errors[STRENGTHS.index(first)]
    assert float((best.left_out_M - torch.from_numpy(y)).square().mean()) == pytest.approx(errors[here])


@pytest.mark.parametrize(
    ("errors", "first", "found", "asked"),
    [
        ([5, 4, 3, 2, 9], 0, 3, [0, 1, 2, 3, 4]),
        ([5, 4, 3, 2, 1], 0, 4, [0, 1, 2, 3, 4]),
        ([1, 4, 3, 2, 9], 1, 0, [0, 1, 2]),
        ([9, 1, 5, 2, 0], 1, 1, [0, 1, 2]),  # a valley is enough: each step costs
        ([3, 3, 3], 1, 1, [0, 1, 2]),
        ([7], 0, 0, [0]),
    ],
)
def test_a_walk_ends_where_no_neighbour_is_better_and_asks_no_place_twice(errors, first, found, asked):
    seen = []

    def error(place):
        seen.append(place)
        return errors[place]

    places = tuple(range(len(errors)))
    assert walk(error, places, first=first) == found
    assert sorted(seen) == asked


def dual_of(phi, y, groups):
    """The same ridge, in the kernel of the rows."""
    return DualRidge(torch.from_numpy(phi @ phi.T), torch.from_numpy(y), groups)


@pytest.mark.parametrize("strength", [2.0**-9, 0.3, 8.0])
def test_ridge_in_the_kernel_of_all_rows_is_ridge_on_their_features(strength):
    phi, y, groups = problem()
    one, other = (make(phi, y, groups).solve(strength) for make in (ridge_of, dual_of))
    for name in ("left_out_M", "own_M", "residual_M"):
        assert getattr(other, name).numpy() == pytest.approx(getattr(one, name).numpy(), abs=CLOSE)
    new = np.random.default_rng(9).normal(size=(7, phi.shape[1]))
    assert other.say(torch.from_numpy(new @ phi.T)).numpy() == pytest.approx(
        one.say(torch.from_numpy(new)).numpy(), abs=CLOSE
    )


@pytest.fixture(params=["features", "kernel"])
def refits(request):
    """Fits of 60 of 80 rows, these in no order, and a function that fits without some rows anew."""
    phi, y, _ = problem(num_rows=80, seed=3)
    rows = np.random.default_rng(3).permutation(80)[:60]
    groups = rows % 11
    is_dual = request.param == "kernel"
    solved = (dual_of if is_dual else ridge_of)(phi[rows], y[rows], groups).solve(0.2)
    found = Refits(lambda some: torch.from_numpy(phi[some] @ phi[rows].T if is_dual else phi[some]), rows, solved)

    def anew(out, asked):
        seen = np.setdiff1d(rows, out)
        return Ridge(alpha=0.2).fit(phi[seen], y[seen]).predict(phi[asked])

    return found, rows, anew


@pytest.mark.parametrize("size", [1, 2, 13, 58])
def test_refits_say_what_fits_without_these_rows_say(refits, size):
    found, rows, anew = refits
    rng = np.random.default_rng(size)
    asked = rng.permutation(80)  # labelled or not, in another order
    without = found.of(asked)
    for _ in range(3):
        out = rng.permutation(80)[:size]
        if len(np.setdiff1d(rows, asked[out])) > 1:
            assert without(out).numpy() == pytest.approx(anew(asked[out], asked[out]), abs=1e-7)
    assert found.own_M.numpy() == pytest.approx(anew([], rows), abs=CLOSE)


def test_refits_without_rows_that_were_not_fitted_and_without_all_that_were(refits):
    found, rows, anew = refits
    others = np.setdiff1d(np.arange(80), rows)
    assert found.of(others)(np.arange(20)).numpy() == pytest.approx(anew([], others), abs=CLOSE)
    everything = found.of(np.arange(80))
    assert everything(np.arange(80)).tolist() == [0.0] * 80  # nothing is left to fit to
    one_left = np.setdiff1d(np.arange(80), rows[:1])
    assert everything(one_left).numpy() == pytest.approx(anew(one_left, one_left), abs=1e-7)
