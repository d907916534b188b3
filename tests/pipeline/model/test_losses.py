"""The masked, weighted loss against sums written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaclip.pipeline.model.losses import mse_loss, weighted_loss
from deltaclip.pipeline.model.scores import Batch, HeadScores


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
    scores = HeadScores(q_sum_N=torch.from_numpy(q_sum), c_sum_N=torch.from_numpy(c_sum))
    batch = Batch(torch.empty(32, 0), torch.empty(32, 0), torch.from_numpy(q), torch.from_numpy(c))
    loss_q, loss_c = np.nanmean((q_sum - q) ** 2), np.nanmean((c_sum - c) ** 2)
    for w_q, w_c in ((0.5, 0.5), (0.9, 0.1), (1.0, 0.0), (0.0, 2.0)):
        loss = weighted_loss("mse", w_q=w_q, w_c=w_c)(scores, batch)
        assert loss.item() == pytest.approx(w_q * loss_q + w_c * loss_c, rel=1e-12)


def test_a_missing_prediction_still_shows():
    loss = mse_loss(torch.tensor([0.5, torch.nan]), torch.tensor([0.5, 0.5]))
    assert torch.isnan(loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mae"}, "unknown loss 'mae'; did you mean 'mse'?"),
        ({"w_q": 0.0, "w_c": 0.0}, "loss weights must not be negative nor both 0, got w_q=0.0 and w_c=0.0"),
        ({"w_q": -1.0}, "loss weights must not be negative nor both 0, got w_q=-1.0 and w_c=0.5"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError) as caught:  # the whole text is compared
        weighted_loss(**arguments)
    assert str(caught.value) == message
