"""Every loss against sums written out in float64, its gradient against differences, and batches with nothing to say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from deltaclip.pipeline.model.losses import (
    BATCH_LOSSES,
    DEFAULT_STD,
    HUBER_DELTA,
    LOSSES,
    MIN_STD,
    PLCC_EPS,
    WEIGHT_FLOOR,
    mse_loss,
    std_weights,
    weighted_loss,
)
from deltaclip.pipeline.model.scores import Batch, HeadScores, TargetScores
from deltaclip.tests import reference


def rows(num_rows, missing, seed=None):
    rng = np.random.default_rng(seed)
    prediction, label = rng.normal(0.5, 0.6, num_rows), rng.random(num_rows)
    label[rng.permutation(num_rows)[:missing]] = np.nan
    return prediction, label


@pytest.mark.parametrize(("num_rows", "missing"), [(1, 0), (64, 0), (64, 63), (64, 20), (5, 5)])
def test_mse_is_the_mean_over_labelled_rows(num_rows, missing):
    prediction, label = rows(num_rows, missing)
    leaf = torch.from_numpy(prediction).requires_grad_()
    loss = mse_loss(leaf, torch.from_numpy(label))
    loss.backward()
    kept = ~np.isnan(label)
    count = max(int(kept.sum()), 1)
    error = np.where(kept, prediction - np.nan_to_num(label), 0)
    assert loss.item() == pytest.approx((error**2).sum() / count, rel=1e-12)
    np.testing.assert_allclose(leaf.grad, 2 * error / count, rtol=1e-12)


def test_weights_and_unclamped_sums():
    q_sum, q = rows(32, 5, seed=1)
    c_sum, c = rows(32, 9, seed=2)
    assert (q_sum > 1).any()
    sums = {"quality": torch.from_numpy(q_sum), "consistency": torch.from_numpy(c_sum)}
    scores = HeadScores({target: TargetScores(sum_N) for target, sum_N in sums.items()})
    labels = {"quality": torch.from_numpy(q), "consistency": torch.from_numpy(c)}
    batch = Batch(torch.empty(32, 0), torch.empty(32, 0), labels)
    loss_q, loss_c = np.nanmean((q_sum - q) ** 2), np.nanmean((c_sum - c) ** 2)
    for w_q, w_c in ((0.5, 0.5), (0.9, 0.1), (1.0, 0.0), (0.0, 2.0)):
        loss = weighted_loss("mse", weights={"quality": w_q, "consistency": w_c})(scores, batch)
        assert loss.item() == pytest.approx(w_q * loss_q + w_c * loss_c, rel=1e-12)


def test_a_missing_prediction_still_shows():
    loss = mse_loss(torch.tensor([0.5, torch.nan]), torch.tensor([0.5, 0.5]))
    assert torch.isnan(loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mae"}, "unknown loss 'mae'; did you mean 'mse'?"),
        ({"weights": {"a": 0.0, "b": 0.0}}, "loss weights must not be negative nor all 0, got a=0.0, b=0.0"),
        ({"weights": {"a": -1.0, "b": 0.5}}, "loss weights must not be negative nor all 0, got a=-1.0, b=0.5"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError) as caught:  # the whole text is compared
        weighted_loss(**{"weights": {"a": 0.5}, **arguments})
    assert str(caught.value) == message


# Truth by formulas over the labelled rows alone; weights and SDs as given.

TRUTH = {
    "mse": lambda x, y, w, std: float(np.mean(w * (x - y) ** 2)),
    "huber": lambda x, y, w, std: reference.huber(x, y, w, delta=HUBER_DELTA),
    "plcc": lambda x, y, w, std: (1 - reference.weighted_pearson(x, y, w, eps=PLCC_EPS)) / 2,
    "rank": lambda x, y, w, std: reference.margin_rank(x, y, w),
    "fidelity": reference.thurstone_fidelity,
}


def case(num_rows, seed=None):
    """Rows with ties among predictions and labels, a third without label, some without SD, one SD of 0."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(0.5, 0.4, num_rows), rng.integers(0, 9, num_rows) / 8
    x[1::5] = x[0]
    y[:2] = 0.25, 0.75
    y[2::3] = np.nan
    w, std = rng.uniform(0.2, 3, num_rows), rng.uniform(0.02, 0.4, num_rows)
    std[3::4] = np.nan
    std[4] = 0.0
    return x, y, w, std


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_rows", [6, 64])
@pytest.mark.parametrize(("weighted", "with_std"), [(False, False), (True, True)])
def test_value_is_that_of_the_formula(name, num_rows, weighted, with_std):
    x, y, w, std = case(num_rows)
    kept = ~np.isnan(y)
    extra = {"weight_B": torch.from_numpy(w)} if weighted else {}
    extra |= {"std_B": torch.from_numpy(std)} if with_std else {}
    found = LOSSES[name](torch.from_numpy(x), torch.from_numpy(y), **extra)
    stds = (
        np.maximum(np.where(np.isnan(std), DEFAULT_STD, std), MIN_STD) if with_std else np.full(num_rows, DEFAULT_STD)
    )
    expected = TRUTH[name](x[kept], y[kept], (w if weighted else np.ones(num_rows))[kept], stds[kept])
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_plcc_is_scipys_correlation():
    """Its epsilon of 1e-8 beside a product of variances near 1e-2 moves it by less than 1e-5."""
    x, y, _, _ = case(64)
    kept = ~np.isnan(y)
    expected = (1 - stats.pearsonr(x[kept], y[kept]).statistic) / 2
    assert LOSSES["plcc"](torch.from_numpy(x), torch.from_numpy(y)).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_agrees_with_float64(name):
    x, y, w, std = (torch.from_numpy(values) for values in case(64))
    wide = LOSSES[name](x, y, weight_B=w, std_B=std)
    narrow = LOSSES[name](x.float(), y.float(), weight_B=w.float(), std_B=std.float())
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(wide.item(), rel=1e-4, abs=1e-6)  # 1 - a - b cancels in fidelity


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_is_that_of_finite_differences(name, weighted):
    x, y, w, std = case(12, seed=5)  # fixed: differences across the kink of huber or rank would be no gradient
    x += np.linspace(0, 0.01, 12)
    extra = {"weight_B": torch.from_numpy(w), "std_B": torch.from_numpy(std)} if weighted else {}
    leaf = torch.from_numpy(x).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: LOSSES[name](z, torch.from_numpy(y), **extra), (leaf,), eps=1e-7, atol=1e-5
    )
    LOSSES[name](leaf, torch.from_numpy(y), **extra).backward()
    assert not leaf.grad[np.isnan(y)].any()
    assert leaf.grad[~np.isnan(y)].any()


NAN = float("nan")
NOTHING_TO_COMPARE = [
    [],
    [0.7],
    [NAN, NAN, NAN],
    [NAN, 0.3, NAN],
    [0.1, 0.1, NAN, 0.1],
    [0.9] * 64,
]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("labels", NOTHING_TO_COMPARE, ids=lambda labels: f"{len(labels)}rows")
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_batches_with_nothing_to_compare_are_harmless(name, labels, spread):
    y = torch.tensor(labels)
    leaf = (0.5 + spread * torch.randn(len(y))).requires_grad_()
    loss = LOSSES[name](leaf, y, weight_B=torch.full_like(y, 2.0), std_B=torch.full_like(y, NAN))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(leaf.grad).all()
    labelled = int((~y.isnan()).sum())
    if labelled == 0 or (labelled == 1 and name in BATCH_LOSSES) or name in ("plcc", "rank"):
        assert loss.item() == 0
        assert not leaf.grad.any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("distance", [0.0, 5.0, 1e4])
def test_gradients_are_finite_however_far_the_scores_are(name, distance):
    """A fidelity of plain square roots is NaN here: the chance of the prediction underflows."""
    y = torch.tensor([0.0, 1.0, 0.5, NAN])
    leaf = (0.5 - distance * (y.nan_to_num(0.5) - 0.5)).requires_grad_()
    loss = LOSSES[name](leaf, y, std_B=torch.full((4,), 0.001))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_truth_costs_nothing_and_noise_costs_more(name):
    x, y, _, std = (torch.from_numpy(values) for values in case(64))
    best = LOSSES[name](y.nan_to_num(0.5), y, std_B=std)
    assert best.item() == pytest.approx(0, abs=1e-6)
    assert LOSSES[name](x, y, std_B=std) > best + 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_a_missing_prediction_shows_in_every_loss(name):
    prediction = torch.tensor([0.2, NAN, 0.5, 0.6])
    assert torch.isnan(LOSSES[name](prediction, torch.tensor([0.1, 0.9, NAN, 0.4])))
    assert torch.isfinite(LOSSES[name](prediction, torch.tensor([0.1, NAN, 0.2, 0.4])))


def test_each_head_gets_its_own_weights_and_stds():
    x, y, w, std = (torch.from_numpy(values) for values in case(32))
    none = torch.empty(32, 0)
    batch = Batch(
        none,
        none,
        {"a": y, "b": y.flip(0), "c": y},
        std_B={"a": std, "b": std / 2},
        weight_B={"a": w, "b": w.flip(0)},
    )
    scores = HeadScores({"a": TargetScores(x), "b": TargetScores(x + 0.1), "c": TargetScores(x - 0.1)})
    loss = weighted_loss("fidelity", weights={"a": 0.3, "b": 0.6, "c": 0.2})(scores, batch)
    of_a = LOSSES["fidelity"](x, y, weight_B=w, std_B=std)
    of_b = LOSSES["fidelity"](x + 0.1, y.flip(0), weight_B=w.flip(0), std_B=std / 2)
    of_c = LOSSES["fidelity"](x - 0.1, y)  # neither weights nor SDs are known of it
    assert loss.item() == pytest.approx(float(0.3 * of_a + 0.6 * of_b + 0.2 * of_c), rel=1e-12)


def test_std_weights_are_inverse_variances_of_mean_one():
    _, y, _, std = case(40)
    found = std_weights(torch.from_numpy(y), torch.from_numpy(std)).numpy()
    known = ~np.isnan(y) & ~np.isnan(std)
    expected = np.array([1 / (s**2 + WEIGHT_FLOOR) for s in std])
    np.testing.assert_allclose(found[known], expected[known] / expected[known].mean(), rtol=1e-12)
    assert (found[~known] == 1).all()
    assert found[known].mean() == pytest.approx(1)
    nothing = torch.full((3,), NAN)
    assert std_weights(torch.ones(3), nothing).tolist() == std_weights(nothing, torch.ones(3)).tolist() == [1, 1, 1]
