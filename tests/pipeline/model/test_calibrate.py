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
from deltaclip.pipeline.model.heads import HeadSpec, ResidualHeads, TargetSpec
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
    v, t, q, c = (torch.from_numpy(x).float() for x in (v, t, q, c))
    return Batch(v, t, {"quality": q, "consistency": c})


def new_heads(dim):
    return ResidualHeads(HeadSpec(dim=dim))


def of_rows(batch, rows):
    return batch.map(lambda x: x[rows])


def relabelled(batch, **labels):
    return batch._replace(label_B={**batch.label_B, **labels})


def blocks(batch, size):
    return [of_rows(batch, slice(i, i + size)) for i in range(0, batch.num_rows, size)]


def logits(q):
    return logit(np.clip(q, LABEL_MARGIN, 1 - LABEL_MARGIN))


@pytest.mark.parametrize(("num_rows", "dim"), [(30, 64), (31, 30), (64, 64), (65, 64), (600, 96), (30, 1280)])
def test_bases_agree_with_scikit_learn(num_rows, dim):
    batch = clip_like(num_rows, dim)
    heads = new_heads(dim)
    found = calibrate(heads, lambda: blocks(batch, 17))
    quality, consistency = heads.quality_head, heads.consistency_head
    v, t, q, c = (x.double().numpy() for x in (*batch[:2], *batch.label_B.values()))
    assert found["quality"].keys() == {"num_rows", "strength", "level"}
    assert found["consistency"].keys() == {"num_rows", "slope", "offset", "level"}

    judge = Ridge(alpha=found["quality"]["strength"], solver="svd").fit(v, logits(q))
    # The weights are stored in float32: 1e-6 of the largest.
    scale = np.abs(judge.coef_).max()
    np.testing.assert_allclose(quality.base.weight[0].detach(), judge.coef_, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(
        quality.base.bias.item() - found["quality"]["level"], judge.intercept_, rtol=1e-6, atol=1e-6 * scale + 1e-6
    )

    x = ((v * t).sum(1)[:, None] + 1) / 2
    line = LinearRegression().fit(x, c)
    slope, offset, level = (found["consistency"][name] for name in ("slope", "offset", "level"))
    np.testing.assert_allclose(slope, line.coef_[0], rtol=1e-6)
    np.testing.assert_allclose(offset - level, line.intercept_, rtol=1e-6)
    np.testing.assert_allclose(consistency.slope.item(), line.coef_[0], rtol=1e-6)
    np.testing.assert_allclose(consistency.offset.item(), offset, rtol=1e-6)

    # Scores are float32 sums of D products; a steep slope enlarges the 1e-7 of a cosine.
    scores = score_rows(heads, [batch])
    expected = expit(judge.predict(v) + found["quality"]["level"])
    np.testing.assert_allclose(scores.of("quality"), expected, rtol=0, atol=2e-5)
    expected = np.clip(line.predict(x) + level, 0, 1)
    np.testing.assert_allclose(scores.of("consistency"), expected, rtol=0, atol=2e-5 + 1e-6 * slope)


@pytest.mark.parametrize("noise", [0.1, 3.0])
@pytest.mark.parametrize("where", ["spread", "at one end"])
def test_the_mean_of_a_base_is_that_of_its_labels(noise, where):
    batch = clip_like(400, 32, seed=1, noise=noise)
    if where == "at one end":  # two thirds of the labels are 0, where a logit is far from a mean
        quality, consistency = batch.label_B.values()
        batch = relabelled(batch, quality=(3 * quality - 2).clamp(min=0), consistency=(4 * consistency - 2).clamp(0, 1))
    heads = new_heads(32)
    found = calibrate(heads, lambda: blocks(batch, 64))
    scores = score_rows(heads, [batch])
    for target, label in batch.label_B.items():
        assert float(scores.of(target).double().mean()) == pytest.approx(float(label.double().mean()), abs=1e-5)
        if where == "at one end":
            assert abs(found[target]["level"]) > 1e-3  # what least squares alone is off by


def sums_of(x, y):
    sums = Sums.zeros(x.shape[1])
    sums.add(torch.from_numpy(x), torch.from_numpy(y))
    return sums


@pytest.mark.parametrize(("num_rows", "dim"), [(40, 12), (25, 60), (26, 25)])
def test_strength_minimises_dense_gcv(num_rows, dim):
    """GCV from its definition, with the full hat matrix: mean (residual / (1 - tr H / N))^2."""
    batch = clip_like(num_rows, dim)
    x, y = batch.v_BD.double().numpy(), logits(batch.label_B["quality"].double().numpy())
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
    x, y = batch.v_BD.double().numpy(), logits(batch.label_B["quality"].double().numpy())
    ridge = fit_ridge(sums_of(x, y))
    judge = Ridge(alpha=ridge.strength, solver="svd").fit(x, y)
    np.testing.assert_allclose(ridge.w_D, judge.coef_, rtol=0, atol=1e-8 * np.abs(judge.coef_).max())


@pytest.mark.parametrize("noise", [0.1, 0.5, 3.0])
def test_strength_agrees_with_leave_one_out(noise):
    """RidgeCV minimises leave-one-out exactly, GCV with the mean leverage: one step may differ."""
    batch = clip_like(800, 48, seed=11, noise=noise)
    x, y = batch.v_BD.double().numpy(), logits(batch.label_B["quality"].double().numpy())
    grid = [10 ** (k / 2) for k in range(-10, 9)]
    judge = RidgeCV(alphas=grid).fit(x, y)
    chosen = fit_ridge(sums_of(x, y), grid).strength
    assert abs(grid.index(chosen) - grid.index(judge.alpha_)) <= 1
    assert 0 < grid.index(chosen) < len(grid) - 1


def test_strength_follows_the_scale_of_the_rows():
    """Rows ten times as long: the same predictions."""
    batch = clip_like(200, 40, seed=5)
    x, y = batch.v_BD.double().numpy(), logits(batch.label_B["quality"].double().numpy())
    one, ten = fit_ridge(sums_of(x, y)), fit_ridge(sums_of(10 * x, y))
    assert ten.strength == pytest.approx(100 * one.strength)
    np.testing.assert_allclose(10 * ten.w_D, one.w_D, rtol=1e-8)


def test_blocks_do_not_matter_and_only_given_rows_count():
    batch = clip_like(300, 32, seed=2)
    results = []
    for size in (300, 64, 7, 1):
        heads = new_heads(32)
        calibrate(heads, partial(blocks, batch, size))
        results.append(heads.quality_head.base.weight.detach())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-7)
    fewer = new_heads(32)
    calibrate(fewer, lambda: blocks(batch, 7)[:-3])
    assert not torch.allclose(fewer.quality_head.base.weight, results[0], rtol=1e-3)


def test_missing_labels_are_masked_per_head():
    batch = clip_like(120, 20, seed=3)
    q, c = (label.clone() for label in batch.label_B.values())
    q[::3], c[1::2] = torch.nan, torch.nan
    masked, only_q, only_c = (new_heads(20) for _ in range(3))
    found = calibrate(masked, lambda: blocks(relabelled(batch, quality=q, consistency=c), 32))
    assert (found["quality"]["num_rows"], found["consistency"]["num_rows"]) == (80, 60)
    calibrate(only_q, lambda: [of_rows(batch, ~q.isnan())])
    calibrate(only_c, lambda: [of_rows(batch, ~c.isnan())])
    of_quality, of_consistency = only_q.quality_head, only_c.consistency_head
    torch.testing.assert_close(masked.quality_head.base.weight, of_quality.base.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masked.consistency_head.slope, of_consistency.slope, rtol=1e-5, atol=1e-6)


def test_an_absent_label_leaves_its_head_at_identity():
    batch = clip_like(50, 10, seed=4)
    nothing = torch.full((50,), torch.nan)
    heads = new_heads(10)
    found = calibrate(heads, lambda: [relabelled(batch, quality=nothing, consistency=nothing)])
    assert found == {
        "quality": {"num_rows": 0, "strength": None, "level": None},
        "consistency": {"num_rows": 0, "slope": None, "offset": None, "level": None},
    }
    scores = score_rows(heads, [batch])
    assert torch.equal(scores.of("quality"), torch.full((50,), 0.5))
    torch.testing.assert_close(scores.of("consistency"), ((batch.v_BD * batch.t_BD).sum(1) + 1) / 2)
    calibrate(heads, lambda: [relabelled(batch, consistency=nothing)])
    assert heads.quality_head.base.weight.any()
    assert heads.consistency_head.slope == 1


def test_every_target_is_calibrated_as_alone():
    batch = clip_like(100, 12, seed=10)
    quality, consistency = batch.label_B.values()
    labels = {"a": quality, "b": consistency, "c": 1 - quality.flip(0), "d": consistency.flip(0)}
    targets = [TargetSpec(name, sees) for name, sees in zip(labels, ("image", "image", "pair", "pair"), strict=True)]
    together = ResidualHeads(HeadSpec(dim=12, targets=tuple(targets)))
    found = calibrate(together, lambda: blocks(batch._replace(label_B=labels), 33))
    assert list(found) == list(labels)
    for target in targets:
        alone = ResidualHeads(HeadSpec(dim=12, targets=(target,)))
        about = calibrate(alone, lambda: blocks(batch._replace(label_B=labels), 33))
        assert about[target.name] == found[target.name]
        for name, parameter in alone.head(target.name).named_parameters():
            if not name.startswith(("mlp", "fusion")):
                assert torch.equal(together.head(target.name).get_parameter(name), parameter)
                assert parameter.any()


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_few_rows_give_finite_bases(num_rows):
    batch = clip_like(max(num_rows, 2), 16, seed=6)
    heads = new_heads(16)
    calibrate(heads, lambda: [of_rows(batch, slice(num_rows))])
    assert all(torch.isfinite(p).all() for p in heads.parameters())


def test_constant_labels_and_constant_columns():
    batch = clip_like(40, 16, seed=7)
    heads = new_heads(16)
    found = calibrate(heads, lambda: [relabelled(batch, quality=torch.full((40,), 0.75))])
    assert found["quality"]["strength"] is None
    torch.testing.assert_close(score_rows(heads, [batch]).of("quality"), torch.full((40,), 0.75))
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
        calibrate(new_heads(4), lambda: [batch])
    assert str(caught.value) == (
        "the training embeddings or labels hold values that are not finite; "
        "find the damaged rows with `deltaclip inspect --verify`"
    )
