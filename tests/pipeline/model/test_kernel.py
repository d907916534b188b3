"""Kernel ridge: against scikit-learn, and left-out predictions against fits that really leave groups out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge

from deltaclip.base.errors import UserError
from deltaclip.pipeline.model import kernel as kernel_module
from deltaclip.pipeline.model.kernel import STRENGTHS, Part, fit_kernel


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


def test_is_kernel_ridge_as_scikit_learn_has_it():
    x, t, y, groups = problem()
    parts = [Part(x, 1.0), Part(t, 0.3, each=False)]
    kernel, said, fit, _ = fit_kernel(parts, y, groups, seed=0)
    points, target = scaled(parts), y.double().numpy()
    expected = free_intercept(points, target, fit.strength)(points)
    assert expected.mean() == pytest.approx(target.mean())
    found = kernel(torch.cat((x, t), dim=1)).numpy()
    # Float32 distances and the jitter of 1e-6 on the diagonal.
    assert found == pytest.approx(expected, abs=2e-4)
    assert fit.strength in STRENGTHS
    assert (fit.num_rows, fit.num_points) == (90, 90)
    assert fit.rmse == pytest.approx(float((said - y).square().mean().sqrt()), rel=1e-4)


def test_left_out_predictions_come_from_fits_without_the_group():
    x, _, y, groups = problem()
    parts = [Part(x, 1.0)]
    _, said, fit, _ = fit_kernel(parts, y, groups, seed=0)
    points, target = scaled(parts), y.double().numpy()
    for group in np.unique(groups):
        out = groups == group
        expected = free_intercept(points[~out], target[~out], fit.strength)(points[out])
        assert said.numpy()[out] == pytest.approx(expected, abs=2e-4)


def test_the_strength_has_the_least_error_over_left_out_groups():
    x, _, y, groups = problem(seed=3)
    _, _, fit, _ = fit_kernel([Part(x, 1.0)], y, groups, seed=0)
    points, target = scaled([Part(x, 1.0)]), y.double().numpy()
    errors = {}
    for strength in STRENGTHS:
        left_out = np.empty(len(y))
        for group in np.unique(groups):
            out = groups == group
            left_out[out] = free_intercept(points[~out], target[~out], strength)(points[out])
        errors[strength] = np.square(target - left_out).mean()
    assert fit.strength == min(errors, key=errors.get)
    assert fit.rmse**2 == pytest.approx(min(errors.values()), rel=1e-3)


def test_rows_without_a_label_are_predicted_but_not_fitted():
    x, _, y, groups = problem()
    masked = y.clone()
    masked[::3] = torch.nan
    kernel, said, fit, _ = fit_kernel([Part(x, 1.0)], masked, groups, seed=0)
    assert fit.num_rows == 60
    assert torch.isfinite(said).all()
    torch.testing.assert_close(said[::3], kernel(x)[::3])
    known = torch.arange(90) % 3 != 0
    again, *_ = fit_kernel([Part(x[known], 1.0)], y[known], groups[known.numpy()], seed=0)
    torch.testing.assert_close(again(x), kernel(x))


def test_new_rows_are_as_far_off_as_left_out_ones():
    """What a correction learns from must be like what it will meet: not the fit's own, smaller errors."""
    x, _, y, groups = problem(num_rows=600, groups=150, seed=1)
    seen = torch.arange(600) < 400
    target = torch.where(seen, y, torch.nan)
    kernel, said, _, _ = fit_kernel([Part(x, 1.0)], target, groups, seed=0)
    error = (said - y).square()
    own = (kernel(x) - y).square()[seen].mean()
    assert own < 0.85 * error[seen].mean()
    assert error[~seen].mean() == pytest.approx(float(error[seen].mean()), rel=0.3)


def test_too_many_rows_are_drawn_by_whole_groups(monkeypatch):
    monkeypatch.setattr(kernel_module, "MAX_ROWS", 200)
    monkeypatch.setattr(kernel_module, "MAX_POINTS", 80)
    x, _, y, groups = problem(num_rows=500, groups=100)
    kernel, said, fit, _ = fit_kernel([Part(x, 1.0)], y, groups, seed=5)
    assert 150 < fit.num_rows <= 200
    assert fit.num_points == len(kernel.beta_L) == 80
    fitted = (said - kernel(x)).abs() > 1e-6
    assert not set(groups[fitted.numpy()]) & set(groups[~fitted.numpy()])
    again, *_ = fit_kernel([Part(x, 1.0)], y, groups, seed=5)
    assert torch.equal(kernel.beta_L, again.beta_L)
    other, *_ = fit_kernel([Part(x, 1.0)], y, groups, seed=6)
    assert not torch.equal(kernel.beta_L, other.beta_L)


def test_equal_rows_and_constant_parts():
    x, t, y, groups = problem(num_rows=30, groups=10)
    twice = torch.cat((x, x))
    parts = [Part(twice, 1.0), Part(torch.zeros_like(torch.cat((t, t))), 0.3, each=False)]
    kernel, said, _, _ = fit_kernel(parts, torch.cat((y, y)), np.concatenate([groups, groups]), seed=0)
    assert torch.isfinite(said).all()
    assert torch.isfinite(kernel.beta_L).all()


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        ("nan", "--view: a view holds values that are not finite; extract it again"),
        ("groups", "--base: a kernel base needs two groups with labels; give calibrated"),
    ],
)
def test_refusals(spoil, line):
    x, _, y, groups = problem()
    if spoil == "nan":
        x[3, 2] = torch.nan
    with pytest.raises(UserError) as error:
        fit_kernel([Part(x, 1.0)], y, np.zeros_like(groups) if spoil == "groups" else groups, seed=0)
    assert str(error.value) == line
