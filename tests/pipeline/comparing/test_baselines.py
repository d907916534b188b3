"""Ridge and SVR, judged by scikit-learn's own and by leaving every group out for real."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from deltaclip.pipeline.comparing import baselines
from deltaclip.pipeline.comparing.baselines import PENALTIES, RELATIVE_STRENGTHS, TUBES, fit_ridge_regression, fit_svr


def data(num_rows, num_features, *, num_groups=7, noise=0.3, seed=0):
    """Rows whose groups share a part of the features and of the noise, as rows of one prompt do."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(num_groups, size=num_rows)
    x = rng.standard_normal((num_rows, num_features)) + rng.standard_normal((num_groups, num_features))[groups]
    y = 0.5 + 0.1 * x @ rng.standard_normal(num_features) / num_features**0.5
    y += 0.1 * noise * (rng.standard_normal(num_rows) + rng.standard_normal(num_groups)[groups])
    return x, y, np.array([f"group {group}" for group in groups])


def negative_error(predicted, truth):
    return -float(np.mean((predicted - truth) ** 2))


def left_out_error(x, y, groups, strength):
    error = 0.0
    for name in np.unique(groups):
        out = groups == name
        fitted = Ridge(alpha=strength, solver="svd").fit(x[~out], y[~out])
        error += float(np.square(fitted.predict(x[out]) - y[out]).sum())
    return error


@pytest.mark.parametrize(("num_rows", "num_features"), [(40, 5), (40, 60), (30, 30), (200, 12)])
def test_ridge_is_scikit_learns_with_the_strength_that_leaving_groups_out_chooses(num_rows, num_features):
    x, y, groups = data(num_rows, num_features)
    found = fit_ridge_regression(x, y, groups)
    unit = np.square(x - x.mean(axis=0)).sum() / num_rows
    errors = [left_out_error(x, y, groups, unit * relative) for relative in RELATIVE_STRENGTHS]
    assert found.chosen["relative_strength"] == RELATIVE_STRENGTHS[int(np.argmin(errors))]
    assert found.chosen["strength"] == pytest.approx(unit * found.chosen["relative_strength"])
    judge = Ridge(alpha=found.chosen["strength"], solver="svd").fit(x, y)
    new = data(20, num_features, seed=1)[0]
    # float64 on both sides; the eigendecomposition squares the condition, strengths keep it below 1e5.
    assert found.predict(new) == pytest.approx(judge.predict(new), abs=1e-9)


@pytest.mark.parametrize("num_features", [20, 49, 50, 80])
def test_the_closed_form_is_the_error_of_groups_left_out_for_real(num_features):
    x, y, groups = data(50, num_features)
    _, code = np.unique(groups, return_inverse=True)
    values, scores, _ = baselines._principal(x - x.mean(axis=0))
    for strength in (0.1, 10.0, 1e3):
        found = baselines._left_out_error(scores, y - y.mean(), values + strength, code)
        assert found == pytest.approx(left_out_error(x, y, groups, strength), rel=1e-9)


def test_groups_ask_for_a_stronger_penalty_than_rows():
    """Where groups share features and noise, leaving out rows rewards remembering the group."""
    chosen = []
    for groups_known in (True, False):
        x, y, groups = data(120, 200, num_groups=12, noise=2.0)
        found = fit_ridge_regression(x, y, groups if groups_known else np.arange(120))
        chosen.append(found.chosen["strength"])
    assert chosen[0] > chosen[1]


def test_one_group_is_left_out_row_by_row():
    x, y, _ = data(40, 6)
    alone = fit_ridge_regression(x, y, np.arange(40))
    assert fit_ridge_regression(x, y, np.zeros(40, dtype=int)).chosen == alone.chosen


def test_rows_without_a_label_change_nothing():
    x, y, groups = data(60, 8)
    gaps = y.copy()
    gaps[::3] = np.nan
    known = ~np.isnan(gaps)
    new = data(10, 8, seed=1)[0]
    ridge, same = fit_ridge_regression(x, gaps, groups), fit_ridge_regression(x[known], y[known], groups[known])
    assert ridge.num_rows == 40
    assert ridge.predict(new) == pytest.approx(same.predict(new), abs=1e-12)
    validation = (np.vstack([new, new]), np.append(np.full(10, np.nan), 0.5 + 0.1 * new[:, 0]))
    svr = fit_svr(x, gaps, validation=validation, judge=negative_error)
    same = fit_svr(x[known], y[known], validation=(new, validation[1][10:]), judge=negative_error)
    assert svr.chosen == same.chosen
    assert svr.predict(new) == pytest.approx(same.predict(new), abs=1e-9)


def test_no_label_at_all_is_the_callers_mistake():
    x, y, groups = data(10, 2)
    with pytest.raises(ValueError, match="no row has a label to fit"):
        fit_ridge_regression(x, y * np.nan, groups)


def test_svr_is_scikit_learns_with_what_validation_rows_choose():
    x, y, _ = data(80, 6)
    x[:, 2] = 3.0  # a feature that does not vary
    x_val, y_val, _ = data(40, 6, seed=1)
    x_val[:, 2] = 3.0
    found = fit_svr(x, y, validation=(x_val, y_val), judge=negative_error)
    mean, sd = y.mean(), y.std()
    judges = {
        (penalty, tube): make_pipeline(StandardScaler(), SVR(C=penalty, epsilon=tube, gamma="scale")).fit(
            x, (y - mean) / sd
        )
        for penalty in PENALTIES
        for tube in TUBES
    }
    scores = {chosen: negative_error(judge.predict(x_val) * sd + mean, y_val) for chosen, judge in judges.items()}
    best = max(scores, key=scores.get)
    assert (found.chosen["C"], found.chosen["epsilon"]) == best
    # The solver stops at 1e-3 of the labels' SD; the same kernel by another route of rounding ends there too.
    assert found.predict(x_val) == pytest.approx(judges[best].predict(x_val) * sd + mean, abs=1e-3 * sd)


def test_equal_labels_are_predicted_as_they_are():
    x, _, groups = data(20, 3)
    flat = np.full(20, 0.3)
    assert (fit_ridge_regression(x, flat, groups).predict(x) == flat.mean()).all()
    assert (fit_svr(x, flat, validation=(x, flat), judge=negative_error).predict(x) == flat.mean()).all()
    assert (fit_ridge_regression(np.ones((20, 3)), flat + groups.argsort() / 100, groups).chosen) == {}


def test_too_many_rows_are_thinned_at_random(monkeypatch):
    monkeypatch.setattr(baselines, "MAX_RIDGE_ROWS", 50)
    monkeypatch.setattr(baselines, "MAX_SVR_ROWS", 30)
    x, y, groups = data(400, 3, noise=0.0)
    ridge = fit_ridge_regression(x, y, groups)
    svr = fit_svr(x, y, validation=(x, y), judge=negative_error)
    assert (ridge.num_rows, svr.num_rows) == (50, 30)
    assert ridge.predict(x) == pytest.approx(y, abs=1e-3)
    assert np.corrcoef(svr.predict(x), y)[0, 1] > 0.8  # a plane from 30 rows
