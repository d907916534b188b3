"""Losses of the steps of an epoch, of one learner or of many heads side by side."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deltaclip.pipeline.loop.epochs import STEPS_PER_CHECK, StepLosses

SIZES = [1, STEPS_PER_CHECK - 1, STEPS_PER_CHECK, STEPS_PER_CHECK + 1, 3 * STEPS_PER_CHECK]


def losses_of(num_steps, shape):
    return np.random.default_rng(num_steps).gamma(1.0, size=(num_steps, *shape)).astype(np.float32)


def filled(losses_SK, read=None):
    losses = StepLosses(read)
    found = [wrong for loss in losses_SK if (wrong := losses.add(torch.from_numpy(np.asarray(loss))))]
    return losses, [*found, *filter(None, [losses.read()])]


@pytest.mark.parametrize("num_steps", SIZES)
@pytest.mark.parametrize("shape", [(), (1,), (5,)])
def test_the_mean_is_that_of_all_steps(num_steps, shape):
    losses_SK = losses_of(num_steps, shape)
    losses, wrong = filled(losses_SK)
    assert (len(losses), wrong) == (num_steps, [])
    # Sums of float64 in any order: a few roundings of 2^-53.
    np.testing.assert_allclose(losses.mean().numpy(), losses_SK.mean(axis=0, dtype=np.float64), rtol=1e-14)


def test_one_loss_a_step_has_a_mean_without_rounding_however_it_was_read():
    losses_S = losses_of(700, ())
    exact = math.fsum(losses_S.tolist()) / 700
    for start in (0, 1, 256, 699):
        earlier, _ = filled(losses_S[:start])
        later, _ = filled(losses_S[start:], earlier.values())
        assert later.mean().item() == exact


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [1, STEPS_PER_CHECK, STEPS_PER_CHECK + 1, 600])
@pytest.mark.parametrize("num_earlier", [0, 300])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_the_first_loss_that_is_not_finite_is_named(value, step, num_earlier, shape):
    losses_SK = losses_of(600, shape)
    losses_SK.reshape(600, -1)[step - 1, -1] = value
    losses_SK.reshape(600, -1)[step:, -1] = math.nan
    _, wrong = filled(losses_SK, torch.from_numpy(losses_of(num_earlier, shape)).double())
    assert wrong[0].step == num_earlier + step
    assert wrong[0].loss == value or (math.isnan(value) and math.isnan(wrong[0].loss))


def test_a_head_that_diverges_leaves_the_means_of_the_others():
    losses_SK = losses_of(300, (3,))
    losses_SK[7, 1] = math.inf
    losses_SK[8, 1] = -math.inf
    mean_K = filled(losses_SK)[0].mean().numpy()
    assert not math.isfinite(mean_K[1])
    np.testing.assert_allclose(mean_K[[0, 2]], losses_SK[:, [0, 2]].mean(axis=0, dtype=np.float64), rtol=1e-14)
