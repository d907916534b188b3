"""Ridge on what people said of rows, ratings and choices between two, with whole groups left out.

f = intercept + phi w minimises half the squared errors of ratings, sigma^2 times the loss of pairs (`preference.py`) of
differences kappa (f_a - f_b), and strength |w|^2 / 2: a posterior mode, found by Newton's method, which is iteratively
reweighted least squares. Without ratings the unit of f is one logit and the intercept is 0. Knows features and what was
said. Must not know what features are made of or where rows come from.

Shapes: M rows, L features, Q rated rows, P pairs, S observations of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from deltaclip.pipeline.model.preference import PairScale, davidson_slopes, fit_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

_STEPS, _TOLERANCE = 12, 1e-4  # of Newton's method: it takes 3 or 4, and what is said of left-out rows is one more
# Ratings in [0, 1] before any fit: a residual SD of .13, and a tenth of the range to a logit.
_FIRST_NOISE, FIRST_KAPPA = 0.13**2, 10.0
_ROUNDS = 2  # in which noise and scale follow from left-out rows
_PENALTY_FREE = 1e-9  # on the intercept


class Said(NamedTuple):
    """What people said of M rows: labels (M,) float64 in [0, 1], NaN without; P pairs of places among the rows."""

    label_M: Tensor
    a_P: Tensor
    b_P: Tensor
    preferred_P: Tensor

    @property
    def has_ratings(self) -> bool:
        """Whether any row has a label."""
        return bool((~torch.isnan(self.label_M)).any())


class PairNoise(NamedTuple):
    """How much an observation says: the variance of ratings about f, and what makes differences of f logits."""

    variance: float
    scale: PairScale


class PairSolved(NamedTuple):
    """A fit of a strength; float64. `left_out_M` is what fits without the row's group say of it, `own_M` what this one.

    `loss` is the negative log-likelihood of all that was said, of left-out rows.
    """

    strength: float
    noise: PairNoise
    w_L: Tensor
    intercept: Tensor
    own_M: Tensor
    left_out_M: Tensor
    loss: float


class PairRidge:
    """Fits for one strength after another; each starts from the one before."""

    def __init__(self, phi_ML: Tensor, said: Said, groups_M: NDArray[np.int64]) -> None:
        """Prepare what all strengths share.

        Args:
            phi_ML: features, float64.
            said: of the rows.
            groups_M: rows of one group are left out together, with all that is said of any of them.
        """
        self.said, self.rated_Q = said, torch.nonzero(~torch.isnan(said.label_M))[:, 0]
        ones_M1 = torch.ones(len(phi_ML), 1, dtype=torch.float64) * float(said.has_ratings)
        self._x_MK = torch.cat([phi_ML, ones_M1], dim=1)
        self._groups = _observations_of_groups(said, self.rated_Q, groups_M)
        self._w_K = torch.zeros(self._x_MK.shape[1], dtype=torch.float64)
        if said.has_ratings:
            self._w_K[-1] = said.label_M[self.rated_Q].mean()

    def first_noise(self) -> PairNoise:
        """Return what is taken for granted before a fit."""
        kappa = FIRST_KAPPA if self.said.has_ratings else 1.0
        scale = fit_scale(torch.zeros_like(self.said.preferred_P), self.said.preferred_P, kappa=kappa)
        return PairNoise(_FIRST_NOISE if self.said.has_ratings else 1.0, scale)

    def solve(self, strength: float, noise: PairNoise) -> PairSolved:
        """Return the fit of a strength above 0 and what fits without each group say.

        Those are one Newton step from the fit to all, in closed form: exact for ratings, and for pairs to second order
        in what one group changes (Rad and Maleki, Journal of the Royal Statistical Society B 82 (2020) 965).
        """
        said = self.said
        for _ in range(_STEPS):
            slope_M, pair_g, pair_h = self._slopes(noise)
            right_K = self._x_MK.T @ slope_M
            right_K[:-1] += strength * self._w_K[:-1]
            root_KK = self._root(strength, pair_h)
            step_K = torch.cholesky_solve(right_K[:, None], root_KK)[:, 0]
            self._w_K = self._w_K - step_K
            if float((self._x_MK @ step_K).abs().max()) < _TOLERANCE * max(1.0, float(self._w_K.abs().max())):
                break
        _, pair_g, pair_h = self._slopes(noise)
        psi_MK = torch.linalg.solve_triangular(root_KK, self._x_MK.T, upper=False).T
        own_M = self._x_MK @ self._w_K
        left_out_M = own_M.clone()
        slope_O = torch.cat([own_M[self.rated_Q] - said.label_M[self.rated_Q], pair_g])
        weight_O = torch.cat([torch.ones(len(self.rated_Q), dtype=torch.float64), pair_h])
        for rows_G, seen_S in self._groups:
            psi_SK = self._of_observations(psi_MK, seen_S)
            # w without S: w + H^-1 X_S^T (I - W_S X_S H^-1 X_S^T)^-1 s_S, where s are slopes and W curvatures.
            system_SS = -weight_O[seen_S][:, None] * (psi_SK @ psi_SK.T)
            system_SS.diagonal().add_(1.0)
            moved_S = torch.linalg.solve(system_SS, slope_O[seen_S])
            left_out_M[rows_G] += psi_MK[rows_G] @ (psi_SK.T @ moved_S)
        loss = self._loss(left_out_M, noise)
        return PairSolved(strength, noise, self._w_K[:-1], self._w_K[-1], own_M, left_out_M, loss)

    def settle(self, strength: float) -> PairNoise:
        """Return noise and scale as left-out rows of a strength show them; of pairs alone only their ties."""
        noise = self.first_noise()
        for _ in range(_ROUNDS):
            left_out_M = self.solve(strength, noise).left_out_M
            difference_P = left_out_M[self.said.a_P] - left_out_M[self.said.b_P]
            if not self.said.has_ratings:
                return noise._replace(scale=fit_scale(difference_P, self.said.preferred_P, kappa=1.0))
            error_Q = (left_out_M - self.said.label_M)[self.rated_Q]
            scale = fit_scale(difference_P, self.said.preferred_P) if len(difference_P) else noise.scale
            noise = PairNoise(float(error_Q.square().mean()), scale)
        return noise

    def _slopes(self, noise: PairNoise) -> tuple[Tensor, Tensor, Tensor]:
        """Return the slope of the loss by f (M,), and of the pairs' part first and second derivative by f_a - f_b."""
        said, f_M = self.said, self._x_MK @ self._w_K
        kappa, variance = noise.scale.kappa, noise.variance
        g_P, h_P = davidson_slopes(kappa * (f_M[said.a_P] - f_M[said.b_P]), said.preferred_P, noise.scale.log_nu)
        g_P, h_P = variance * kappa * g_P, variance * kappa**2 * h_P
        slope_M = torch.zeros_like(f_M)
        slope_M[self.rated_Q] = (f_M - said.label_M)[self.rated_Q]
        slope_M.index_add_(0, said.a_P, g_P)
        slope_M.index_add_(0, said.b_P, -g_P)
        return slope_M, g_P, h_P

    def _root(self, strength: float, h_P: Tensor) -> Tensor:
        """Return the Cholesky root of the Hessian X^T A X + strength, A the curvature by f: sparse, (M, M)."""
        said, num_rows = self.said, len(self._x_MK)
        curved_MK = torch.zeros_like(self._x_MK)
        curved_MK[self.rated_Q] = self._x_MK[self.rated_Q]
        both = torch.cat([said.a_P, said.b_P])
        other = torch.cat([said.b_P, said.a_P])
        places = torch.stack([torch.cat([both, both]), torch.cat([both, other])])
        values = torch.cat([h_P, h_P, -h_P, -h_P])
        if len(h_P):
            curved_MK += torch.sparse.mm(
                torch.sparse_coo_tensor(places, values, (num_rows, num_rows), check_invariants=False), self._x_MK
            )
        system_KK = self._x_MK.T @ curved_MK
        system_KK = (system_KK + system_KK.T) / 2
        system_KK.diagonal().add_(strength)
        system_KK[-1, -1] += _PENALTY_FREE - strength if self.said.has_ratings else 0.0
        root_KK: Tensor = torch.linalg.cholesky(system_KK)
        return root_KK

    def _of_observations(self, psi_MK: Tensor, seen_S: Tensor) -> Tensor:
        """Return the features of observations: those of a rated row, and of a pair the difference."""
        num_rated = len(self.rated_Q)
        rated, pairs = seen_S[seen_S < num_rated], seen_S[seen_S >= num_rated] - num_rated
        differences = psi_MK[self.said.a_P[pairs]] - psi_MK[self.said.b_P[pairs]]
        return torch.cat([psi_MK[self.rated_Q[rated]], differences])

    def _loss(self, f_M: Tensor, noise: PairNoise) -> float:
        return said_loss(f_M, self.said, noise)


def said_loss(f_M: Tensor, said: Said, noise: PairNoise) -> float:
    """Return the negative log-likelihood of all that was said, but for constants, given what is predicted (M,)."""
    known_M = ~torch.isnan(said.label_M)
    ratings = (f_M - said.label_M)[known_M].square().sum() / (2 * noise.variance)
    return float(ratings + noise.scale.loss(f_M[said.a_P] - f_M[said.b_P], said.preferred_P).sum())


def _observations_of_groups(said: Said, rated_Q: Tensor, groups_M: NDArray[np.int64]) -> list[tuple[Tensor, Tensor]]:
    """Return of each group its rows, and the numbers of what is said of any of them: ratings first, then pairs."""
    _, code_M = np.unique(groups_M, return_inverse=True)
    num_rated, a_P, b_P = len(rated_Q), said.a_P.numpy(), said.b_P.numpy()
    pair_P = np.arange(len(a_P)) + num_rated
    across = code_M[a_P] != code_M[b_P]
    seen = np.concatenate([np.arange(num_rated), pair_P, pair_P[across]])
    of = np.concatenate([code_M[rated_Q.numpy()], code_M[a_P], code_M[b_P[across]]])
    return [
        (torch.from_numpy(rows), torch.from_numpy(np.sort(observed)))
        for rows, observed in zip(_by_code(code_M, np.arange(len(code_M))), _by_code(of, seen, code_M), strict=True)
        if len(observed)
    ]


def _by_code(
    code_K: NDArray[np.int64], value_K: NDArray[np.int64], like_M: NDArray[np.int64] | None = None
) -> Sequence[NDArray[np.int64]]:
    """Return the values of each code in turn, of all codes that `like_M` has."""
    order = np.argsort(code_K, kind="stable")
    num_codes = int((code_K if like_M is None else like_M).max()) + 1
    ends = np.cumsum(np.bincount(code_K, minlength=num_codes))[:-1]
    return np.split(value_K[order], ends)
