"""Bradley-Terry with ties, and ridge on pairs, against slow formulas and against fits without a group."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime, minimize

from deltaclip.pipeline.model.losses import PairTerm, weighted_loss
from deltaclip.pipeline.model.pair_ridge import PairNoise, PairRidge, Said, said_loss
from deltaclip.pipeline.model.preference import PairScale, davidson_loss, davidson_slopes, fit_scale
from deltaclip.pipeline.model.scores import Batch, HeadScores, TargetScores

FINITE = st.floats(-30, 30, allow_nan=False, width=64)
SHARES = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1, width=64))


def davidson(eta, share, nu):
    """Return the negative log-likelihood of one pair, from the probabilities of Davidson (1970) as they stand."""
    worth_a, worth_b = math.exp(eta), 1.0
    total = worth_a + worth_b + nu * math.sqrt(worth_a * worth_b)
    if share == 0.5 and nu > 0:
        return -math.log(nu * math.sqrt(worth_a * worth_b) / total)
    return -share * math.log(worth_a / total) - (1 - share) * math.log(worth_b / total)


@settings(max_examples=100, deadline=None)
@given(FINITE, SHARES, st.floats(0.01, 20))
def test_the_loss_is_that_of_the_formula(eta, share, nu):
    one, other = (torch.tensor([value], dtype=torch.float64) for value in (eta, share))
    found = davidson_loss(one, other, math.log(nu))
    assert float(found) == pytest.approx(davidson(eta, share, nu), abs=1e-9, rel=1e-9)


def test_without_ties_a_tie_is_half_a_win_and_half_a_defeat():
    eta = torch.tensor([0.7], dtype=torch.float64)
    half = torch.tensor([0.5], dtype=torch.float64)
    assert float(davidson_loss(eta, half, -math.inf)) == pytest.approx(davidson(0.7, 0.5, 0.0))


def test_probabilities_sum_to_one():
    eta, log_nu = torch.linspace(-5, 5, 11, dtype=torch.float64), math.log(0.8)
    total = sum(torch.exp(-davidson_loss(eta, torch.full_like(eta, p), log_nu)) for p in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(total, 1, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(FINITE, SHARES), min_size=1, max_size=6), st.floats(0.01, 20))
def test_slopes_are_those_of_the_loss(pairs, nu):
    """First derivative by torch's and by scipy's differences, second by torch's."""
    eta, share = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    eta.requires_grad_()
    first, second = davidson_slopes(eta.detach(), share, math.log(nu))
    (by_torch,) = torch.autograd.grad(davidson_loss(eta, share, math.log(nu)).sum(), eta, create_graph=True)
    np.testing.assert_allclose(first, by_torch.detach(), atol=1e-12)
    (curved,) = torch.autograd.grad(by_torch.sum(), eta)
    np.testing.assert_allclose(second, curved, atol=1e-12)

    def loss(at):
        return sum(davidson(one, p, nu) for one, p in zip(at, share.tolist(), strict=True))

    np.testing.assert_allclose(first, approx_fprime(eta.detach().numpy(), loss, 1e-6), atol=1e-4)


def test_scale_and_ties_are_found_again():
    """Of 40,000 pairs drawn from the model, within four standard errors."""
    generator = np.random.default_rng(3)
    x = generator.normal(0, 0.2, 40_000)
    eta, nu = 6 * x, 0.7
    weights = np.stack([np.exp(eta / 2), np.exp(-eta / 2), np.full_like(eta, nu)])
    drawn = (generator.random(len(x)) > np.cumsum(weights / weights.sum(axis=0), axis=0)).sum(axis=0)
    found = fit_scale(torch.from_numpy(x), torch.tensor([1.0, 0.0, 0.5])[torch.from_numpy(drawn)])
    assert found.kappa == pytest.approx(6, abs=0.25)
    assert math.exp(found.log_nu) == pytest.approx(nu, abs=0.04)


def test_pairs_enter_the_loss_on_the_unclamped_sum():
    """Scores beyond 1 that are ordered wrongly have a gradient; ratings beside them count as before."""
    sums = torch.tensor([1.4, 1.2, 0.3], requires_grad=True)
    label = torch.tensor([math.nan, math.nan, 0.5])
    batch = Batch(
        torch.zeros(3, 2), torch.zeros(3, 2), {"quality": label}, pair_P3={"quality": torch.tensor([[0.0, 1.0, 0.0]])}
    )
    term = PairTerm(PairScale(5.0, 0.1), 0.25)
    loss = weighted_loss(weights={"quality": 1.0}, pairs={"quality": term})(
        HeadScores({"quality": TargetScores(sums)}), batch
    )
    assert loss.item() == pytest.approx(0.2**2 + 0.25 * davidson(1.0, 0.0, math.exp(0.1)), rel=1e-5)
    (slope,) = torch.autograd.grad(loss, sums)
    assert slope[0] > 0 > slope[1]


# ---- Ridge on what was said


def made(seed, *, rated, num_rows=60, num_pairs=150):
    """Return features, what was said of rows in groups of five, and the groups."""
    generator = np.random.default_rng(seed)
    phi, w = generator.standard_normal((num_rows, 6)), generator.standard_normal(6)
    f, groups = phi @ w, np.arange(num_rows) // 5
    a = generator.integers(0, num_rows, num_pairs)
    b = a // 5 * 5 + (a + generator.integers(1, 5, num_pairs)) % 5
    noisy = f[a] - f[b] + generator.logistic(size=num_pairs)
    preferred = np.where(np.abs(noisy) < 0.4, 0.5, noisy > 0)
    label = 0.5 + 0.1 * f + 0.05 * generator.standard_normal(num_rows) if rated else np.full(num_rows, np.nan)
    label[::7] = np.nan
    said = Said(*(torch.from_numpy(column) for column in (label, a, b, preferred)))
    return torch.from_numpy(phi), said, groups


@pytest.mark.parametrize("rated", [True, False])
def test_the_fit_is_the_least_of_its_loss(rated):
    phi, said, groups = made(1, rated=rated)
    noise, strength = PairNoise(0.01 if rated else 1.0, PairScale(8.0 if rated else 1.0, -0.3)), 0.7
    solved = PairRidge(phi, said, groups).solve(strength, noise)

    def loss(w):
        f = phi @ torch.from_numpy(w[:-1]) + w[-1] * rated
        return noise.variance * said_loss(f, said, noise) + strength / 2 * float(w[:-1] @ w[:-1])

    best = minimize(loss, np.zeros(7), method="BFGS", options={"gtol": 1e-7}).x
    np.testing.assert_allclose(solved.w_L.numpy(), best[:-1], atol=2e-3)
    np.testing.assert_allclose(solved.own_M.numpy(), phi.numpy() @ best[:-1] + best[-1] * rated, atol=5e-3)


@pytest.mark.parametrize(("rated", "within"), [(True, 0.02), (False, 0.03)])
def test_what_is_left_out_is_what_fits_without_the_group_say(rated, within):
    """Within a few hundredths of the SD of what they say: one step of Newton's method from the fit to all."""
    phi, said, groups = made(2, rated=rated)
    ridge = PairRidge(phi, said, groups)
    noise = ridge.settle(0.5)
    solved = ridge.solve(0.5, noise)
    for group in range(12):
        inside, kept = torch.from_numpy(groups == group), torch.from_numpy(groups[said.a_P] != group)
        label = torch.where(inside, torch.nan, said.label_M)
        without = Said(label, said.a_P[kept], said.b_P[kept], said.preferred_P[kept])
        refitted = PairRidge(phi, without, groups).solve(0.5, noise)
        difference = (refitted.own_M - solved.left_out_M)[inside].abs().max()
        assert float(difference) < within * float(solved.left_out_M.std())


def test_pairs_across_groups_vouch_for_neither():
    """With a pair that joins two groups, left-out rows of both are of fits without it."""
    phi, said, groups = made(4, rated=False, num_pairs=80)
    joined = Said(
        said.label_M,
        torch.cat([said.a_P, torch.tensor([0])]),
        torch.cat([said.b_P, torch.tensor([59])]),
        torch.cat([said.preferred_P, torch.tensor([1.0])]),
    )
    noise = PairNoise(1.0, PairScale(1.0, -0.3))
    with_pair, without = (PairRidge(phi, each, groups).solve(1.0, noise).left_out_M for each in (joined, said))
    np.testing.assert_allclose(with_pair[[0, 59]].numpy(), without[[0, 59]].numpy(), atol=0.03)


def test_pairs_drawn_by_lot_teach_nothing():
    """Left-out order is chance: mean over 20 draws of 300 pairs within four standard errors of one half."""
    shares = []
    for seed in range(20):
        phi, said, groups = made(seed, rated=False, num_pairs=300)
        lots = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, 300).astype(np.float64))
        solved = PairRidge(phi, said._replace(preferred_P=lots), groups).solve(
            1.0, PairNoise(1.0, PairScale(1.0, -5.0))
        )
        difference = solved.left_out_M[said.a_P] - solved.left_out_M[said.b_P]
        shares.append(float((torch.sign(difference) == torch.sign(lots - 0.5)).double().mean()))
    assert np.mean(shares) == pytest.approx(0.5, abs=4 * np.std(shares) / np.sqrt(20))
