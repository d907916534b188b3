"""Ridge, straight and in a kernel: against scikit-learn, left-out rows against fits that really leave groups out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

from deltaclip.base.errors import UserError
from deltaclip.pipeline.model import kernel as kernel_module
from deltaclip.pipeline.model.kernel import STRENGTHS, Line, Part, fit_member


def problem(num_rows=90, seed=0, groups=20):
    generator = torch.Generator().manual_seed(seed)
    x, t = (torch.randn(num_rows, width, generator=generator) * scale for width, scale in ((6, 3.0), (4, 0.1)))
    x[:, 0] *= 1e4  # entries of any size count alike
    x[:, 1] = 7.0  # one that does not vary counts nothing
    y = torch.sin(x[:, 2]) + 0.1 * t[:, 0] + 0.1 * torch.randn(num_rows, generator=generator)
    return x, t, y, np.random.default_rng(seed).integers(groups, size=num_rows)


def scaled(parts):
    """Float64 points in which the mean squared distance of two rows, each pair counted, is the weight of each part."""
    found = []
    for part in parts:
        a = part.vector_NW.double().numpy()
        a = a - a.mean(0)
        sd = a.std(0)
        if part.each:
            a = a[:, sd > 1e-6] / sd[sd > 1e-6]
        squared = ((a[:, None] - a[None]) ** 2).sum(-1).mean()
        found.append(a * np.sqrt(part.weight / squared))
    return np.concatenate(found, axis=1)


def free_intercept(points, target, strength):
    """Kernel ridge whose intercept is not penalised: scikit-learn's on y - b, with the b of least error and penalty."""
    ridge = [
        KernelRidge(alpha=strength, kernel="rbf", gamma=1.0).fit(points, y) for y in (target, np.ones(len(target)))
    ]
    intercept = ridge[0].dual_coef_.sum() / ridge[1].dual_coef_.sum()
    return lambda x: ridge[0].predict(x) + intercept * (1 - ridge[1].predict(x))


def judged(kind, points, target, strength):
    """Return what scikit-learn's fit says of points; the intercept of its `Ridge` is not penalised."""
    if kind == "kernel":
        return free_intercept(points, target, strength)
    return Ridge(alpha=strength).fit(points, target).predict


def fit(kind, parts, y, groups, **settings):
    return fit_member(kind, parts, y, groups, **{"seed": 0} | settings)


KINDS = ("kernel", "line")
# Float32 distances, and the jitter of 1e-6 on the diagonal where landmarks are used.
CLOSE = 2e-4


@pytest.mark.parametrize("kind", KINDS)
def test_is_ridge_as_scikit_learn_has_it(kind):
    x, t, y, groups = problem()
    parts = [Part(x, 1.0), Part(t, 0.3, each=False)]
    found = fit(kind, parts, y, groups)
    points, target = scaled(parts), y.double().numpy()
    expected = judged(kind, points, target, found.fit.strength)(points)
    assert expected.mean() == pytest.approx(target.mean())
    said = found.member(torch.cat((x, t), dim=1)).numpy()
    assert said == pytest.approx(expected, abs=CLOSE)
    assert found.refits.own_M.numpy() == pytest.approx(expected, abs=CLOSE)
    assert found.fit.strength in STRENGTHS[kind]
    assert (found.fit.num_rows, found.fit.num_points) == (90, 90 if kind == "kernel" else 0)
    assert found.fit.rmse == pytest.approx(float((found.left_out_M - y).square().mean().sqrt()), rel=1e-6)
    assert torch.equal(found.say(parts), found.left_out_M.float())  # all rows were fitted to


@pytest.mark.parametrize("width", [3, 89, 90, 91, 400])
def test_a_line_of_any_width_is_scikit_learns(width):
    """With more features than rows it is found through the products of rows."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(90, width, generator=generator) + 5
    y = x[:, :3].sum(dim=1) + torch.randn(90, generator=generator)
    groups = np.arange(90) // 4
    found = fit("line", [Part(x, 1.0)], y, groups)
    points, target = scaled([Part(x, 1.0)]), y.double().numpy()
    judge = Ridge(alpha=found.fit.strength).fit(points, target)
    assert isinstance(found.member, Line)
    # The jitter of 1e-6 against a strength of 1.5e-5 and more, and labels that spread by 2.
    assert found.member(x).numpy() == pytest.approx(judge.predict(points), abs=5e-3)
    for group in np.unique(groups):
        out = groups == group
        expected = Ridge(alpha=found.fit.strength).fit(points[~out], target[~out]).predict(points[out])
        assert found.left_out_M.numpy()[out] == pytest.approx(expected, abs=5e-3)


def test_what_does_not_vary_has_no_weight_in_a_line():
    x, _, y, groups = problem()
    member = fit("line", [Part(x, 1.0)], y, groups).member
    assert member.weight_P[1] == 0
    moved = x.clone()
    moved[:, 1] = 1e6
    assert torch.equal(member(moved), member(x))


@pytest.mark.parametrize("kind", KINDS)
def test_left_out_predictions_come_from_fits_without_the_group(kind):
    x, _, y, groups = problem()
    parts = [Part(x, 1.0)]
    found = fit(kind, parts, y, groups)
    points, target = scaled(parts), y.double().numpy()
    for group in np.unique(groups):
        out = groups == group
        expected = judged(kind, points[~out], target[~out], found.fit.strength)(points[out])
        assert found.left_out_M.numpy()[out] == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_refits_are_fits_without_the_rows(kind):
    """Also without rows that have no label, and of places that stand in another order."""
    x, _, y, groups = problem()
    y[::5] = torch.nan
    found = fit(kind, [Part(x, 1.0)], y, groups)
    rows = np.flatnonzero(~np.isnan(y.numpy()))
    own = x.double().numpy()
    sd = own[rows].std(0)
    varies = sd > 1e-6
    points = ((own - own[rows].mean(0)) / np.where(varies, sd, 1))[:, varies] / np.sqrt(2 * varies.sum())
    asked = np.random.default_rng(0).permutation(90)[:40]
    without = found.refits.of(asked)
    for out in (np.arange(12), np.array([3]), np.arange(39, 20, -1)):
        seen = np.setdiff1d(rows, asked[out])
        expected = judged(kind, points[seen], y.double().numpy()[seen], found.fit.strength)(points[asked[out]])
        assert without(out).numpy() == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_strength_has_the_least_error_over_left_out_groups(kind):
    x, _, y, groups = problem(seed=3)
    found = fit(kind, [Part(x, 1.0)], y, groups)
    points, target = scaled([Part(x, 1.0)]), y.double().numpy()
    errors = {}
    for strength in STRENGTHS[kind]:
        left_out = np.empty(len(y))
        for group in np.unique(groups):
            out = groups == group
            left_out[out] = judged(kind, points[~out], target[~out], strength)(points[out])
        errors[strength] = np.square(target - left_out).mean()
    assert found.fit.strength == min(errors, key=errors.get)
    assert found.fit.rmse**2 == pytest.approx(min(errors.values()), rel=1e-3)
    given = fit(kind, [Part(x, 1.0)], y, groups, strength=STRENGTHS[kind][1])
    assert given.fit.strength == STRENGTHS[kind][1]
    assert given.fit.rmse**2 == pytest.approx(errors[STRENGTHS[kind][1]], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_label_are_predicted_but_not_fitted(kind):
    x, _, y, groups = problem()
    masked = y.clone()
    masked[::3] = torch.nan
    found = fit(kind, [Part(x, 1.0)], masked, groups)
    said = found.say([Part(x, 1.0)])
    assert found.fit.num_rows == 60
    assert torch.isfinite(said).all()
    torch.testing.assert_close(said[::3], found.member(x)[::3])
    known = torch.arange(90) % 3 != 0
    again = fit(kind, [Part(x[known], 1.0)], y[known], groups[known.numpy()])
    torch.testing.assert_close(again.member(x), found.member(x))


def test_new_rows_are_as_far_off_as_left_out_ones():
    """What a correction learns from must be like what it will meet: not the fit's own, smaller errors."""
    x, _, y, groups = problem(num_rows=600, groups=150, seed=1)
    seen = torch.arange(600) < 400
    target = torch.where(seen, y, torch.nan)
    found = fit("kernel", [Part(x, 1.0)], target, groups)
    error = (found.say([Part(x, 1.0)]) - y).square()
    own = (found.member(x) - y).square()[seen].mean()
    assert own < 0.85 * error[seen].mean()
    assert error[~seen].mean() == pytest.approx(float(error[seen].mean()), rel=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_rows_are_drawn_by_whole_groups(kind, monkeypatch):
    monkeypatch.setattr(kernel_module, "MAX_POINTS", 80)
    x, _, y, groups = problem(num_rows=500, groups=100)
    found = fit(kind, [Part(x, 1.0)], y, groups, seed=5, most=200)
    assert 150 < found.fit.num_rows == len(found.rows_M) <= 200
    assert found.fit.num_points == (80 if kind == "kernel" else 0)
    others = np.setdiff1d(np.arange(500), found.rows_M)
    assert not set(groups[found.rows_M]) & set(groups[others])
    said = found.say([Part(x, 1.0)])
    torch.testing.assert_close(said[others], found.member(x)[others])
    again = fit(kind, [Part(x, 1.0)], y, groups, seed=5, most=200)
    assert torch.equal(found.member(x), again.member(x))
    other = fit(kind, [Part(x, 1.0)], y, groups, seed=6, most=200)
    assert not torch.equal(found.member(x), other.member(x))


def test_a_line_wider_than_its_landmarks_says_about_what_all_rows_say(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 20, generator=generator) @ torch.randn(20, 200, generator=generator)  # of rank 20
    y = x[:, 0] / x[:, 0].std() + 0.3 * torch.randn(300, generator=generator)
    exact = fit("line", [Part(x, 1.0)], y, np.arange(300) // 3)
    monkeypatch.setattr(kernel_module, "MAX_POINTS", 100)
    fewer = fit("line", [Part(x, 1.0)], y, np.arange(300) // 3, strength=exact.fit.strength)
    # A hundred landmarks span all twenty directions, so that nothing is lost but to the jitter.
    assert fewer.member(x).numpy() == pytest.approx(exact.member(x).numpy(), abs=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows_and_constant_parts(kind):
    x, t, y, groups = problem(num_rows=30, groups=10)
    twice = torch.cat((x, x))
    parts = [Part(twice, 1.0), Part(torch.zeros_like(torch.cat((t, t))), 0.3, each=False)]
    found = fit(kind, parts, torch.cat((y, y)), np.concatenate([groups, groups]))
    assert torch.isfinite(found.say(parts)).all()
    assert torch.isfinite(found.member(torch.cat((twice, torch.zeros(60, 4)), dim=1))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_are_all_alike_are_said_of_every_row(kind):
    x, _, _, groups = problem()
    found = fit(kind, [Part(x, 1.0)], torch.full((90,), 0.7), groups)
    assert found.member(2 * x).numpy() == pytest.approx(np.full(90, 0.7), abs=1e-6)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        ("nan", "--base: a view holds values that are not finite; extract it again, or give calibrated"),
        ("groups", "--base: a base needs two groups with labels; give calibrated"),
    ],
)
def test_refusals(spoil, line):
    x, _, y, groups = problem()
    if spoil == "nan":
        x[3, 2] = torch.nan
    with pytest.raises(UserError) as error:
        fit("kernel", [Part(x, 1.0)], y, np.zeros_like(groups) if spoil == "groups" else groups)
    assert str(error.value) == line
