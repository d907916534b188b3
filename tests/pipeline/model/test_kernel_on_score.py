"""Ridge on a learned score: against fits that really leave folds out, and against rows that are really new."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LinearRegression

from deltaclip.pipeline.model import kernel as kernel_module
from deltaclip.pipeline.model.kernel import Part, fit_member, with_left_out
from deltaclip.pipeline.model.kernel_on_score import Nested, OnScore, Score, deal_folds, fit_on_score
from deltaclip.tests.pipeline.model.test_kernel import free_intercept, judged, scaled

WEIGHT = 0.3


def problem(num_rows, *, groups, seed, signal=1.0, width=5):
    """Vectors, two labels that share noise which no vector tells, and groups; `signal` is what vectors say of both."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((num_rows, width))).float()
    shared = torch.from_numpy(rng.standard_normal(num_rows)).float()
    told = signal * torch.sin(x[:, 0])
    q = told + shared
    c = told + shared + 0.3 * torch.from_numpy(rng.standard_normal(num_rows)).float()
    return x, q, c, rng.integers(groups, size=num_rows)


class Found(NamedTuple):
    """A fit on a score, what it says of all rows beyond its line, and what it was made of."""

    on: OnScore
    said_N: torch.Tensor
    nested: Nested
    strength: float


def score_of(x, q, groups):
    first = fit_member("kernel", [Part(x, 1.0)], q, groups, seed=0)
    return Score(first.say([Part(x, 1.0)]), first.refits), first.fit.strength


def fitted(x, q, c, *, groups, line=None, kind="kernel", weight=WEIGHT):
    return fitted_on(score_of(x, q, groups), x, c, groups=groups, line=line, kind=kind, weight=weight)


def fitted_on(given, x, c, *, groups, line=None, kind="kernel", weight=WEIGHT):
    z = torch.zeros(len(x)) if line is None else line
    score, strength = given
    nested = Nested.of(score, c, groups, seed=0)
    on = fit_on_score(kind, [Part(x, 1.0)], c, nested, weight=weight, x_N=z)
    parts = [Part(x, 1.0), *([Part(score.said_N[:, None], weight)] if weight else [])]
    said_N = with_left_out(on.member, parts, nested.rows_M, on.term_M, num_rows=len(x))
    return Found(on, said_N, nested, strength)


@pytest.mark.parametrize("weight", [WEIGHT, 0.0])
@pytest.mark.parametrize(("kind", "width"), [("kernel", 5), ("line", 5), ("line", 80)])
def test_what_is_said_of_a_fold_comes_from_fits_that_never_saw_it(kind, width, weight):
    x, q, c, groups = problem(70, groups=12, seed=0, width=width)
    q[::7], c[3::9] = torch.nan, torch.nan  # rows with one label
    z = torch.linspace(-1, 1, 70)
    found = fitted(x, q, c, groups=groups, line=z, kind=kind, weight=weight)
    rows, fold, nested = found.nested.rows_M, found.nested.fold_M, found.nested.score_KM.numpy()
    assert rows.tolist() == np.flatnonzero(~np.isnan(c.numpy())).tolist()
    fold_of_group = dict(zip(groups[rows], fold, strict=True))
    fold_N = np.array([fold_of_group.get(group, -1) for group in groups])
    known_q = ~np.isnan(q.numpy())
    scale = np.flatnonzero(known_q)  # entries are scaled by the rows that a fit saw
    own = x.double().numpy()
    points_q = (own - own[scale].mean(0)) / own[scale].std(0) / np.sqrt(2 * own.shape[1])

    def score_without(*folds):
        seen = known_q & ~np.isin(fold_N, folds)
        return free_intercept(points_q[seen], q.double().numpy()[seen], found.strength)(points_q)

    points_c = scaled([Part(x[rows], 1.0)])
    y, line = c.double().numpy()[rows], z.double().numpy()[rows]
    expected = np.empty(len(rows))
    for out in range(fold.max() + 1):
        inner = np.array([score_without(out, fold[place])[row] for place, row in enumerate(rows)])
        assert nested[out] == pytest.approx(inner, abs=2e-4)
        seen = fold != out
        straight = LinearRegression().fit(line[seen][:, None], y[seen]).predict(line[:, None])
        spread = 2 * inner[seen].var()
        points = np.concatenate([points_c, inner[:, None] * np.sqrt(weight / spread)], axis=1)
        said = judged(kind, points[seen], (y - straight)[seen], found.on.fit.strength)(points)
        expected[~seen] = (said + straight)[~seen]
    assert nested[-1] == pytest.approx([score_without(fold[place])[row] for place, row in enumerate(rows)], abs=2e-4)
    # Float32 products against strengths of 1.5e-5 and more.
    assert found.on.left_out_M.numpy() == pytest.approx(expected, abs=1e-3)
    whole = (found.on.slope * z + found.on.offset + found.said_N).numpy()[rows]
    assert whole == pytest.approx(expected, abs=1e-3)
    assert found.on.fit.rmse == pytest.approx(np.sqrt(np.square(expected - y).mean()), rel=1e-3)


def test_without_vectors_and_score_it_is_a_line_alone():
    x, _, c, groups = problem(70, groups=12, seed=5)
    c[3::9] = torch.nan
    z = x[:, 0] + 0.1
    nested = Nested.of(Score(torch.zeros(70), None), c, groups, seed=0)
    on = fit_on_score("line", [], c, nested, weight=0.0, x_N=z)
    rows, y = nested.rows_M, c.double().numpy()
    judge = LinearRegression().fit(z.double().numpy()[rows, None], y[rows])
    assert (on.member, on.fit.num_points) == (None, 0)
    assert (on.slope, on.offset) == pytest.approx((judge.coef_[0], judge.intercept_), abs=1e-6)
    for fold in range(5):
        out, seen = rows[nested.fold_M == fold], rows[nested.fold_M != fold]
        judge = LinearRegression().fit(z.double().numpy()[seen, None], y[seen])
        expected = judge.predict(z.double().numpy()[out, None])
        assert on.left_out_M.numpy()[nested.fold_M == fold] == pytest.approx(expected, abs=1e-6)
    said = on.slope * z[rows] + on.offset + on.term_M
    assert said.numpy() == pytest.approx(on.left_out_M.numpy(), abs=1e-6)


def test_a_line_on_the_score_alone():
    """Without vectors: what the score says, and no more."""
    x, q, c, groups = problem(200, groups=50, seed=6)
    score, _ = score_of(x, q, groups)
    nested = Nested.of(score, c, groups, seed=0)
    on = fit_on_score("line", [], c, nested, weight=1.0, x_N=torch.zeros(200))
    inner, y = nested.score_KM[-1].numpy(), c.double().numpy()
    points = (inner - inner.mean())[:, None] / np.sqrt(2 * inner.var())
    expected = judged("line", points, y, on.fit.strength)(points)
    assert on.own_M.numpy() == pytest.approx(expected, abs=1e-4)
    assert on.member(torch.from_numpy(inner)[:, None].float()).numpy() + on.offset == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["kernel", "line"])
def test_left_out_figures_of_noise_are_those_of_new_rows(kind):
    """Both labels share noise, the vectors tell nothing: with a score left out group by group this gave .77."""
    left_out, new = [], []
    for seed in range(8):
        x, q, c, groups = problem(300, groups=60, seed=seed, signal=0.0)
        seen = np.arange(300) < 200
        groups[~seen] += 60
        hidden = [torch.where(torch.from_numpy(seen), label, torch.nan) for label in (q, c)]
        said = fitted(x, *hidden, groups=groups, kind=kind).said_N.numpy()
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
    found = fitted(x, q, c, groups=groups)
    alone = fitted_on((Score(torch.zeros(400), None), 0.0), x, c, groups=groups)
    with_score, without = (spearmanr(one.said_N.numpy()[300:], x[300:, 0])[0] for one in (found, alone))
    assert with_score > without + 0.05
    assert found.on.fit.rmse < alone.on.fit.rmse


@pytest.mark.parametrize("kind", ["kernel", "line"])
def test_landmarks_say_about_what_all_rows_say(monkeypatch, kind):
    x, q, c, groups = problem(300, groups=60, seed=2)
    exact = fitted(x, q, c, groups=groups, kind=kind)
    monkeypatch.setattr(kernel_module, "MAX_POINTS", 250)
    fewer = fitted(x, q, c, groups=groups, kind=kind)
    if kind == "kernel":
        assert (exact.on.fit.num_points, fewer.on.fit.num_points) == (300, 250)
    assert np.corrcoef(exact.said_N, fewer.said_N)[0, 1] > 0.98
    assert fewer.on.own_M.mean() == pytest.approx(float(c.mean()), abs=1e-6)


@pytest.mark.parametrize("kind", ["kernel", "line"])
@pytest.mark.parametrize("num_groups", [2, 3, 4, 20])
def test_few_groups(num_groups, kind):
    x, q, c, _ = problem(20, groups=2, seed=3)
    found = fitted(x, q, c, groups=np.arange(20) % num_groups, kind=kind)
    assert torch.isfinite(found.said_N).all()
    assert found.on.own_M.mean() == pytest.approx(float(c.mean()), abs=1e-6)


def test_labels_of_the_score_in_other_groups_than_the_target():
    """Quality in two groups of one fold pair: without these no row is left, and the score says nothing."""
    x, q, c, groups = problem(60, groups=6, seed=4)
    q[groups > 1] = torch.nan
    assert torch.isfinite(fitted(x, q, c, groups=groups).said_N).all()


def test_fewer_rows_are_whole_groups_of_the_same_folds_and_scores():
    x, q, c, groups = problem(300, groups=60, seed=7)
    nested = fitted(x, q, c, groups=groups).nested
    assert nested.fewer(groups, most=300) is nested
    some = nested.fewer(groups, most=100)
    assert 60 < len(some.rows_M) <= 100
    assert not set(groups[some.rows_M]) & set(groups[np.setdiff1d(nested.rows_M, some.rows_M)])
    place = np.searchsorted(nested.rows_M, some.rows_M)
    assert np.array_equal(some.fold_M, nested.fold_M[place])
    assert torch.equal(some.score_KM, nested.score_KM[:, place])
    # With so few rows a fold would be empty: all are kept.
    assert nested.fewer(groups, most=8) is nested


def test_folds_are_whole_groups_of_about_equal_rows():
    groups = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 12, size=40))
    fold = deal_folds(groups, seed=1)
    assert len(set(zip(groups, fold, strict=True))) == 40
    sizes = np.bincount(fold)
    assert len(sizes) == 5
    assert np.ptp(sizes) <= 2
    assert deal_folds(np.array([7, 7, 9]), seed=0).tolist() in ([0, 0, 1], [1, 1, 0])
