"""The closed-form start, judged by scikit-learn and by dense linear algebra."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from sklearn.linear_model import LinearRegression, Ridge, RidgeCV

from deltaclip.base.errors import UserError
from deltaclip.pipeline.model.calibrate import (
    LABEL_MARGIN,
    RELATIVE_STRENGTHS,
    Sums,
    calibrate,
    fit_line,
    fit_ridge,
)
from deltaclip.pipeline.model.heads import ResidualHeads
from deltaclip.pipeline.model.scores import Batch, score_rows


def clip_like(num_rows, dim, seed=None, noise=0.5):
    """Rows in a narrow cone with a falling spectrum, as CLIP's; noisy labels, two of them at 0 and 1."""
    rng = np.random.default_rng(seed)
    spectrum = (1 + np.arange(dim)) ** -0.5
    cone = 1.5 * rng.standard_normal(dim)

    def rows():
        x = cone + rng.standard_normal((num_rows, dim)) * spectrum
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    v, t = rows(), rows()
    signal = (v - v.mean(0)) @ rng.standard_normal(dim)
    signal = 1.5 * signal / max(signal.std(), 1e-12)
    q = np.clip(expit(signal + noise * rng.standard_normal(num_rows)), 0.02, 0.98)
    s = (v * t).sum(1)
    c = np.clip(0.5 + 0.2 * (s - s.mean()) / s.std() + 0.1 * rng.standard_normal(num_rows), 0, 1)
    q[:2] = (0, 1)[:num_rows]
    return Batch(*(torch.from_numpy(x).float() for x in (v, t, q, c)))


def blocks(batch, size):
    return [Batch(*(x[i : i + size] for x in batch[:4])) for i in range(0, len(batch.q_B), size)]


def logits(q):
    return logit(np.clip(q, LABEL_MARGIN, 1 - LABEL_MARGIN))


@pytest.mark.parametrize(("num_rows", "dim"), [(30, 64), (31, 30), (64, 64), (65, 64), (600, 96), (30, 1280)])
def test_bases_agree_with_scikit_learn(num_rows, dim):
    batch = clip_like(num_rows, dim)
    heads = ResidualHeads(dim)
    found = calibrate(heads, lambda: blocks(batch, 17))
    v, t, q, c = (x.double().numpy() for x in batch[:4])

    judge = Ridge(alpha=found.ridge_strength, solver="svd").fit(v, logits(q))
    # The weights are stored in float32: 1e-6 of the largest.
    scale = np.abs(judge.coef_).max()
    np.testing.assert_allclose(heads.q_base.weight[0].detach(), judge.coef_, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(
        heads.q_base.bias.item() - found.level_q, judge.intercept_, rtol=1e-6, atol=1e-6 * scale + 1e-6
    )

    x = ((v * t).sum(1)[:, None] + 1) / 2
    line = LinearRegression().fit(x, c)
    np.testing.assert_allclose(found.slope, line.coef_[0], rtol=1e-6)
    np.testing.assert_allclose(found.offset - found.level_c, line.intercept_, rtol=1e-6)
    np.testing.assert_allclose(heads.c_slope.item(), line.coef_[0], rtol=1e-6)
    np.testing.assert_allclose(heads.c_offset.item(), found.offset, rtol=1e-6)

    # Scores are float32 sums of D products; a steep slope enlarges the 1e-7 of a cosine.
    scores = score_rows(heads, [batch])
    np.testing.assert_allclose(scores.q, expit(judge.predict(v) + found.level_q), rtol=0, atol=2e-5)
    expected = np.clip(line.predict(x) + found.level_c, 0, 1)
    np.testing.assert_allclose(scores.c, expected, rtol=0, atol=2e-5 + 1e-6 * found.slope)


@pytest.mark.parametrize("noise", [0.1, 3.0])
@pytest.mark.parametrize("where", ["spread", "at one end"])
def test_the_mean_of_a_base_is_that_of_its_labels(noise, where):
    batch = clip_like(400, 32, seed=1, noise=noise)
    if where == "at one end":  # two thirds of the labels are 0, where a logit is far from a mean
        batch = batch._replace(q_B=(3 * batch.q_B - 2).clamp(min=0), c_B=(4 * batch.c_B - 2).clamp(0, 1))
    heads = ResidualHeads(32)
    found = calibrate(heads, lambda: blocks(batch, 64))
    scores = score_rows(heads, [batch])
    for said, label in ((scores.q, batch.q_B), (scores.c, batch.c_B)):
        assert float(said.double().mean()) == pytest.approx(float(label.double().mean()), abs=1e-5)
    if where == "at one end":
        assert min(abs(found.level_q), abs(found.level_c)) > 1e-3  # what least squares alone is off by


def sums_of(x, y):
    sums = Sums.zeros(x.shape[1])
    sums.add(torch.from_numpy(x), torch.from_numpy(y))
    return sums


@pytest.mark.parametrize(("num_rows", "dim"), [(40, 12), (25, 60), (26, 25)])
def test_strength_minimises_dense_gcv(num_rows, dim):
    """GCV from its definition, with the full hat matrix: mean (residual / (1 - tr H / N))^2."""
    batch = clip_like(num_rows, dim)
    x, y = batch.v_BD.double().numpy(), logits(batch.q_B.double().numpy())
    centred = x - x.mean(0)
    unit = (centred**2).sum() / num_rows
    grid = [unit * relative for relative in RELATIVE_STRENGTHS]
    values = []
    for alpha in grid:
        inner = np.linalg.inv(centred @ centred.T + alpha * np.eye(num_rows))
        hat = centred @ centred.T @ inner + 1 / num_rows
        # y - H y, written so that it does not cancel where a weak strength all but interpolates.
        left = alpha * inner @ (y - y.mean())
        values.append(np.mean(left**2) / (np.trace(np.eye(num_rows) - hat) / num_rows) ** 2)
    chosen = fit_ridge(sums_of(x, y)).strength
    nearest = int(np.argmin([abs(np.log(alpha / chosen)) for alpha in grid]))
    assert grid[nearest] == pytest.approx(chosen, rel=1e-9)
    assert values[nearest] == pytest.approx(min(values), rel=1e-6)


def test_a_direction_that_hardly_varies_still_counts():
    """Seed 417 has an eigenvalue of 2e-9 of the mean, below what GCV can use."""
    batch = clip_like(31, 30, seed=417)
    x, y = batch.v_BD.double().numpy(), logits(batch.q_B.double().numpy())
    ridge = fit_ridge(sums_of(x, y))
    judge = Ridge(alpha=ridge.strength, solver="svd").fit(x, y)
    np.testing.assert_allclose(ridge.w_D, judge.coef_, rtol=0, atol=1e-8 * np.abs(judge.coef_).max())


@pytest.mark.parametrize("noise", [0.1, 0.5, 3.0])
def test_strength_agrees_with_leave_one_out(noise):
    """RidgeCV minimises leave-one-out exactly, GCV with the mean leverage: one step may differ."""
    batch = clip_like(800, 48, seed=11, noise=noise)
    x, y = batch.v_BD.double().numpy(), logits(batch.q_B.double().numpy())
    grid = [10 ** (k / 2) for k in range(-10, 9)]
    judge = RidgeCV(alphas=grid).fit(x, y)
    chosen = fit_ridge(sums_of(x, y), grid).strength
    assert abs(grid.index(chosen) - grid.index(judge.alpha_)) <= 1
    assert 0 < grid.index(chosen) < len(grid) - 1


def test_strength_follows_the_scale_of_the_rows():
    """Rows ten times as long: the same predictions."""
    batch = clip_like(200, 40, seed=5)
    x, y = batch.v_BD.double().numpy(), logits(batch.q_B.double().numpy())
    one, ten = fit_ridge(sums_of(x, y)), fit_ridge(sums_of(10 * x, y))
    assert ten.strength == pytest.approx(100 * one.strength)
    np.testing.assert_allclose(10 * ten.w_D, one.w_D, rtol=1e-8)


def test_blocks_do_not_matter_and_only_given_rows_count():
    batch = clip_like(300, 32, seed=2)
    results = []
    for size in (300, 64, 7, 1):
        heads = ResidualHeads(32)
        calibrate(heads, partial(blocks, batch, size))
        results.append(heads.q_base.weight.detach())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-7)
    fewer = ResidualHeads(32)
    calibrate(fewer, lambda: blocks(batch, 7)[:-3])
    assert not torch.allclose(fewer.q_base.weight, results[0], rtol=1e-3)


def test_missing_labels_are_masked_per_head():
    batch = clip_like(120, 20, seed=3)
    q, c = batch.q_B.clone(), batch.c_B.clone()
    q[::3], c[1::2] = torch.nan, torch.nan
    masked, only_q, only_c = (ResidualHeads(20) for _ in range(3))
    found = calibrate(masked, lambda: blocks(batch._replace(q_B=q, c_B=c), 32))
    assert (found.num_rows_q, found.num_rows_c) == (80, 60)
    calibrate(only_q, lambda: [Batch(*(x[~q.isnan()] for x in batch[:4]))])
    calibrate(only_c, lambda: [Batch(*(x[~c.isnan()] for x in batch[:4]))])
    torch.testing.assert_close(masked.q_base.weight, only_q.q_base.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masked.c_slope, only_c.c_slope, rtol=1e-5, atol=1e-6)


def test_an_absent_label_leaves_its_head_at_identity():
    batch = clip_like(50, 10, seed=4)
    nothing = torch.full((50,), torch.nan)
    heads = ResidualHeads(10)
    found = calibrate(heads, lambda: [batch._replace(q_B=nothing, c_B=nothing)])
    assert found.to_json() == {
        "num_rows_q": 0,
        "num_rows_c": 0,
        "slope": None,
        "offset": None,
        "ridge_strength": None,
        "level_q": None,
        "level_c": None,
    }
    scores = score_rows(heads, [batch])
    assert torch.equal(scores.q, torch.full((50,), 0.5))
    torch.testing.assert_close(scores.c, ((batch.v_BD * batch.t_BD).sum(1) + 1) / 2)
    calibrate(heads, lambda: [batch._replace(c_B=nothing)])
    assert heads.q_base.weight.any()
    assert heads.c_slope == 1


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_few_rows_give_finite_bases(num_rows):
    batch = clip_like(max(num_rows, 2), 16, seed=6)
    heads = ResidualHeads(16)
    calibrate(heads, lambda: [Batch(*(x[:num_rows] for x in batch[:4]))])
    assert all(torch.isfinite(p).all() for p in heads.parameters())


def test_constant_labels_and_constant_columns():
    batch = clip_like(40, 16, seed=7)
    heads = ResidualHeads(16)
    found = calibrate(heads, lambda: [batch._replace(q_B=torch.full((40,), 0.75))])
    assert found.ridge_strength is None
    torch.testing.assert_close(score_rows(heads, [batch]).q, torch.full((40,), 0.75))
    same = np.full((40, 1), 0.61)
    y = np.random.default_rng(0).random(40)
    assert fit_line(sums_of(same, y)) == (0.0, pytest.approx(y.mean()))


def test_pure_noise_shrinks_to_the_mean():
    rng = np.random.default_rng(8)
    x, y = rng.standard_normal((2000, 10)), rng.standard_normal(2000)
    ridge = fit_ridge(sums_of(x, y))
    assert ridge.w_D.norm() < 0.05


def test_damaged_embeddings_are_named():
    batch = clip_like(10, 4, seed=9)
    batch.v_BD[3, 1] = torch.inf
    with pytest.raises(UserError) as caught:
        calibrate(ResidualHeads(4), lambda: [batch])
    assert str(caught.value) == (
        "the training embeddings or labels hold values that are not finite; "
        "find the damaged rows with `deltaclip inspect --verify`"
    )
