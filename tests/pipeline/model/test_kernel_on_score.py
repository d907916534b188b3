"""A kernel on a learned score: against fits that really leave folds out, and against rows that are really new."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LinearRegression

from deltaclip.pipeline.model import kernel as kernel_module
from deltaclip.pipeline.model.kernel import Part, fit_kernel
from deltaclip.pipeline.model.kernel_on_score import Score, deal_folds, fit_kernel_on_score, nested_scores
from deltaclip.tests.pipeline.model.test_kernel import free_intercept, scaled

WEIGHT = 0.3


def problem(num_rows, *, groups, seed, signal=1.0):
    """Vectors, two labels that share noise which no vector tells, and groups; `signal` is what vectors say of both."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((num_rows, 5))).float()
    shared = torch.from_numpy(rng.standard_normal(num_rows)).float()
    told = signal * torch.sin(x[:, 0])
    q = told + shared
    c = told + shared + 0.3 * torch.from_numpy(rng.standard_normal(num_rows)).float()
    return x, q, c, rng.integers(groups, size=num_rows)


def fitted(x, q, c, *, groups, line=None):
    line = torch.zeros(len(x)) if line is None else line
    _, said, fit, refits = fit_kernel([Part(x, 1.0)], q, groups, seed=0)
    found = fit_kernel_on_score([Part(x, 1.0)], Score(said, refits, WEIGHT), c, groups, x_N=line, seed=0)
    return found, refits, fit.strength


def test_what_is_said_of_a_fold_comes_from_fits_that_never_saw_it():
    x, q, c, groups = problem(70, groups=12, seed=0)
    q[::7], c[3::9] = torch.nan, torch.nan  # rows with one label
    z = torch.linspace(-1, 1, 70)
    found, refits, strength = fitted(x, q, c, groups=groups, line=z)
    rows = np.flatnonzero(~np.isnan(c.numpy()))
    fold = deal_folds(groups[rows], seed=0)
    nested = nested_scores(Score(found.said_N, refits, WEIGHT), rows, fold, groups).numpy()
    fold_of_group = dict(zip(groups[rows], fold, strict=True))
    fold_N = np.array([fold_of_group.get(group, -1) for group in groups])
    known_q, known_c = ~np.isnan(q.numpy()), ~np.isnan(c.numpy())
    scale = np.flatnonzero(known_q)  # entries are scaled by the rows that a fit saw
    own = x.double().numpy()
    points_q = (own - own[scale].mean(0)) / own[scale].std(0) / np.sqrt(2 * own.shape[1])

    def score_without(*folds):
        seen = known_q & ~np.isin(fold_N, folds)
        return free_intercept(points_q[seen], q.double().numpy()[seen], strength)(points_q)

    points_c = scaled([Part(x[rows], 1.0)])
    y, line = c.double().numpy()[rows], z.double().numpy()[rows]
    expected = np.empty(len(rows))
    for out in range(fold.max() + 1):
        inner = np.array([score_without(out, fold[place])[row] for place, row in enumerate(rows)])
        assert nested[out] == pytest.approx(inner, abs=2e-4)
        seen = fold != out
        straight = LinearRegression().fit(line[seen][:, None], y[seen]).predict(line[:, None])
        spread = 2 * inner[seen].var()
        points = np.concatenate([points_c, inner[:, None] * np.sqrt(WEIGHT / spread)], axis=1)
        said = free_intercept(points[seen], (y - straight)[seen], found.fit.strength)(points)
        expected[~seen] = (said + straight)[~seen]
    assert known_c.sum() == len(rows)
    assert nested[-1] == pytest.approx([score_without(fold[place])[row] for place, row in enumerate(rows)], abs=2e-4)
    said = (found.slope * z + found.offset + found.said_N).numpy()[rows]
    assert said == pytest.approx(expected, abs=5e-4)
    assert found.fit.rmse == pytest.approx(np.sqrt(np.square(expected - y).mean()), rel=1e-3)


def test_left_out_figures_of_noise_are_those_of_new_rows():
    """Both labels share noise, the vectors tell nothing: with a score left out group by group this gave .77."""
    left_out, new = [], []
    for seed in range(8):
        x, q, c, groups = problem(300, groups=60, seed=seed, signal=0.0)
        seen = np.arange(300) < 200
        groups[~seen] += 60
        hidden = [torch.where(torch.from_numpy(seen), label, torch.nan) for label in (q, c)]
        found, _, _ = fitted(x, *hidden, groups=groups)
        said = found.said_N.numpy()
        left_out.append(spearmanr(said[seen], c.numpy()[seen])[0])
        new.append(spearmanr(said[~seen], c.numpy()[~seen])[0])
    # The SD of SROCC without any relation is 1 / sqrt(n - 1).
    assert np.mean(left_out) < 3 / np.sqrt(8 * 199)
    assert abs(np.mean(new)) < 3 / np.sqrt(8 * 99)


def test_a_score_that_tells_something_is_used():
    """Five times as many rows have the first label as the second, and both follow the same one of thirty entries."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((400, 30))).float()
    q, c = (x[:, 0] + noise * torch.from_numpy(rng.standard_normal(400)).float() for noise in (0.2, 0.5))
    c[60:], q[300:] = torch.nan, torch.nan
    groups = np.arange(400) // 4
    found, *_ = fitted(x, q, c, groups=groups)
    nothing = Score(torch.zeros(400), None, WEIGHT)
    alone = fit_kernel_on_score([Part(x, 1.0)], nothing, c, groups, x_N=torch.zeros(400), seed=0)
    with_score, without = (spearmanr(one.said_N.numpy()[300:], x[300:, 0])[0] for one in (found, alone))
    assert with_score > without + 0.05
    assert found.fit.rmse < alone.fit.rmse


def test_landmarks_say_about_what_all_rows_say(monkeypatch):
    x, q, c, groups = problem(300, groups=60, seed=2)
    exact, _, _ = fitted(x, q, c, groups=groups)
    monkeypatch.setattr(kernel_module, "MAX_POINTS", 250)
    fewer, _, _ = fitted(x, q, c, groups=groups)
    assert (exact.fit.num_points, fewer.fit.num_points) == (300, 250)
    assert np.corrcoef(exact.said_N, fewer.said_N)[0, 1] > 0.98
    assert fewer.own_M.mean() == pytest.approx(float(c.mean()), abs=1e-6)


@pytest.mark.parametrize("num_groups", [2, 3, 4, 20])
def test_few_groups(num_groups):
    x, q, c, _ = problem(20, groups=2, seed=3)
    found, _, _ = fitted(x, q, c, groups=np.arange(20) % num_groups)
    assert torch.isfinite(found.said_N).all()
    assert found.own_M.mean() == pytest.approx(float(c.mean()), abs=1e-6)


def test_labels_of_the_score_in_other_groups_than_the_target():
    """Quality in two groups of one fold pair: without these no row is left, and the score says nothing."""
    x, q, c, groups = problem(60, groups=6, seed=4)
    q[groups > 1] = torch.nan
    found, _, _ = fitted(x, q, c, groups=groups)
    assert torch.isfinite(found.said_N).all()


def test_folds_are_whole_groups_of_about_equal_rows():
    groups = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 12, size=40))
    fold = deal_folds(groups, seed=1)
    assert len(set(zip(groups, fold, strict=True))) == 40
    sizes = np.bincount(fold)
    assert len(sizes) == 5
    assert np.ptp(sizes) <= 2
    assert deal_folds(np.array([7, 7, 9]), seed=0).tolist() in ([0, 0, 1], [1, 1, 0])
