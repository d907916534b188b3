"""Ridge regression with whole groups left out, in closed form.

Knows features and labels. Must not know what features are made of or where rows come from.

Shapes: M rows that are fitted to, L features, G rows of a group or that refits are asked about, S rows that are left
out, U other rows.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    # How much the label of each fitted row in the second list moves what is said of each row in the first, places among
    # the rows that refits are asked about: a part of the hat matrix.
    Hat = Callable[[NDArray[np.int64], NDArray[np.int64]], Tensor]


class Solved(NamedTuple):
    """A fit f = mean + (phi - mean_L) w_L of a strength, the intercept not penalised; float64.

    `psi_ML` are features in which the hat matrix is 1/M + psi psi^T, `root_LL` what makes them of centred phi.
    `left_out_M` is what fits without the row's group say of it, `own_M` what this fit says, `residual_M` what that
    leaves.
    """

    strength: float
    w_L: Tensor
    mean_L: Tensor
    mean: Tensor
    psi_ML: Tensor
    root_LL: Tensor
    left_out_M: Tensor
    own_M: Tensor
    residual_M: Tensor

    @property
    def intercept(self) -> Tensor:
        """What f is at phi = 0."""
        return self.mean - self.mean_L @ self.w_L

    def say(self, phi_UL: Tensor) -> Tensor:
        """Return f of rows."""
        said_U: Tensor = self.mean + (phi_UL - self.mean_L) @ self.w_L
        return said_U

    def hat(self, place_G: NDArray[np.int64], phi_UL: Tensor) -> Hat:
        """Return the hat matrix of rows by their places among the fitted, -1 of others, whose features are given."""
        psi_GL = self.psi_ML[place_G]
        if len(phi_UL):
            psi_LU = torch.linalg.solve_triangular(self.root_LL, (phi_UL - self.mean_L).T, upper=False)
            psi_GL[place_G < 0] = psi_LU.T
        return lambda row, column: psi_GL[row] @ psi_GL[column].T + 1 / len(self.psi_ML)


class DualSolved(NamedTuple):
    """A fit f = intercept + k beta_M of a strength, of the kernel with all fitted rows; float64.

    The bordered system of fit and intercept has the inverse C of `inverse_MM`, beta = C y, in its corner, and in its
    border `mean_M`, the weights of the intercept; y - f = strength beta, so the hat matrix is I - strength C. The rest
    is as in `Solved`.
    """

    strength: float
    beta_M: Tensor
    intercept: Tensor
    inverse_MM: Tensor
    mean_M: Tensor
    left_out_M: Tensor
    own_M: Tensor
    residual_M: Tensor

    def say(self, k_UM: Tensor) -> Tensor:
        """Return f of rows."""
        said_U: Tensor = self.intercept + k_UM @ self.beta_M
        return said_U

    def hat(self, place_G: NDArray[np.int64], k_UM: Tensor) -> Hat:
        """Return the hat matrix of rows by their places among the fitted, -1 of others, whose kernel is given."""
        hat_GM = self.inverse_MM[place_G] * -self.strength
        fitted = np.flatnonzero(place_G >= 0)
        hat_GM[fitted, place_G[fitted]] += 1
        if len(k_UM):
            hat_GM[place_G < 0] = k_UM @ self.inverse_MM + self.mean_M
        return lambda row, column: hat_GM[row][:, place_G[column]]


class DualRidge:
    """Ridge in a kernel of the rows with themselves, for one strength after another: (K + strength I) beta = y - b.

    A fifth of the work of ridge on as many features as rows, and the same fit: an inverse is all that it needs.
    """

    def __init__(self, k_MM: Tensor, y_M: Tensor, groups_M: NDArray[Any]) -> None:
        """Take the kernel and labels, float64, and the groups, at least two."""
        self.y_M, self._k_MM, self._blocks = y_M, k_MM, _blocks(groups_M, width=1)

    def solve(self, strength: float) -> DualSolved:
        """Return the fit of a strength above 0."""
        system_MM = self._k_MM.clone()
        system_MM.diagonal().add_(strength)
        inverse_MM = torch.cholesky_inverse(torch.linalg.cholesky(system_MM))
        ones_M = inverse_MM.sum(dim=1)
        inverse_MM -= torch.outer(ones_M, mean_M := ones_M / ones_M.sum())
        beta_M = inverse_MM @ self.y_M
        left_out_M = torch.empty_like(beta_M)
        for rows_nG in self._blocks:
            # Leaving out a group: e_g = C_gg^-1 beta_g (Cook and Weisberg 1982, as below).
            inverse_nGG = inverse_MM[rows_nG[:, :, None], rows_nG[:, None, :]]
            error_nG = torch.linalg.solve(inverse_nGG, beta_M[rows_nG][..., None])[..., 0]
            left_out_M[rows_nG] = self.y_M[rows_nG] - error_nG
        residual_M = strength * beta_M
        intercept = mean_M @ self.y_M
        own_M = self.y_M - residual_M
        return DualSolved(strength, beta_M, intercept, inverse_MM, mean_M, left_out_M, own_M, residual_M)

    def best(self, strengths: Sequence[float], *, first: float) -> DualSolved:
        """Return the fit whose left-out rows have the least squared error, found by `walk`."""
        return _best(self.solve, self.y_M, strengths, first=first)


class GroupRidge:
    """Ridge of y on phi for one strength after another: w = (Phi^T Phi + strength I)^-1 Phi^T y, both centred."""

    def __init__(self, phi_ML: Tensor, y_M: Tensor, groups_M: NDArray[Any]) -> None:
        """Prepare what all strengths share.

        Args:
            phi_ML: features, float64.
            y_M: labels, float64.
            groups_M: rows of one group are left out together; at least two groups.
        """
        self.y_M, self._mean_L, self._mean = y_M, phi_ML.mean(dim=0), y_M.mean()
        self._centred_ML = phi_ML - self._mean_L
        self._gram_LL = self._centred_ML.T @ self._centred_ML
        self._right_L = self._centred_ML.T @ (y_M - self._mean)
        self._blocks = _blocks(groups_M, width=len(groups_M))

    def solve(self, strength: float) -> Solved:
        """Return the fit of a strength above 0."""
        system_LL = self._gram_LL.clone()
        system_LL.diagonal().add_(strength)
        root_LL = torch.linalg.cholesky(system_LL)
        w_L = torch.cholesky_solve(self._right_L[:, None], root_LL)[:, 0]
        psi_ML = torch.linalg.solve_triangular(root_LL, self._centred_ML.T, upper=False).T
        own_M = self._mean + self._centred_ML @ w_L
        residual_M = self.y_M - own_M
        left_out_M = torch.empty_like(residual_M)
        for rows_nG in self._blocks:
            # Leaving out a group: e_g = (I - H_gg)^-1 r_g (Cook and Weisberg 1982, section 4.4).
            psi_nGL = psi_ML[rows_nG]
            system_nGG = -psi_nGL @ psi_nGL.transpose(1, 2) - 1 / len(residual_M)
            system_nGG.diagonal(dim1=1, dim2=2).add_(1.0)
            error_nG = torch.linalg.solve(system_nGG, residual_M[rows_nG][..., None])[..., 0]
            left_out_M[rows_nG] = self.y_M[rows_nG] - error_nG
        return Solved(strength, w_L, self._mean_L, self._mean, psi_ML, root_LL, left_out_M, own_M, residual_M)

    def best(self, strengths: Sequence[float], *, first: float) -> Solved:
        """Return the fit whose left-out rows have the least squared error, found by `walk`."""
        return _best(self.solve, self.y_M, strengths, first=first)


AnySolved = TypeVar("AnySolved", Solved, DualSolved)


def _best(solve: Callable[[float], AnySolved], y_M: Tensor, strengths: Sequence[float], *, first: float) -> AnySolved:
    least: list[tuple[float, AnySolved]] = []  # the best so far: each holds numbers of all rows

    def squared_error(strength: float) -> float:
        solved = solve(strength)
        error = float((solved.left_out_M - y_M).square().mean())
        if not least or error <= least[0][0]:
            least[:] = [(error, solved)]
        return error

    strength = walk(squared_error, strengths, first=first)
    best = least[0][1]
    return best if best.strength == strength else solve(strength)


def walk(error: Callable[[float], float], strengths: Sequence[float], *, first: float) -> float:
    """Return the strength whose neighbours in a rising list are no better, from `first` on: each costs a factorisation.

    Of equals the one that was found first.
    """
    error = functools.cache(error)
    here = strengths.index(first)
    while True:
        near = [place for place in (here, here + 1, here - 1) if 0 <= place < len(strengths)]
        best = min(near, key=lambda place: error(strengths[place]))
        if best == here:
            return strengths[here]
        here = best


# Entries of the features of a block of groups: 32 MB at a time.
_BLOCK_ENTRIES = 4_000_000


def _blocks(groups_M: NDArray[Any], *, width: int) -> list[Tensor]:
    """Return the places of the rows of groups of equal size, (n, G) each, in blocks of bounded size of such a width."""
    _, code_M, size_G = np.unique(groups_M, return_inverse=True, return_counts=True)
    order = np.lexsort((code_M, size_G[code_M]))
    blocks, start = [], 0
    for size, count in zip(*np.unique(size_G, return_counts=True), strict=True):
        rows_nG = torch.from_numpy(order[start : start + size * count].reshape(count, size))
        start += size * count
        blocks += rows_nG.split(max(1, _BLOCK_ENTRIES // (int(size) * max(width, int(size)))))
    return blocks


class Refits:
    """Fits without some rows, in closed form from the fit to all: the strength stays, the intercept does not."""

    def __init__(
        self, phi: Callable[[NDArray[np.int64]], Tensor], rows_M: NDArray[np.int64], solved: Solved | DualSolved
    ) -> None:
        """Keep what refits need.

        Args:
            phi: features of some of N rows, or their kernel with the fitted ones, float64.
            rows_M: the rows that were fitted to.
            solved: the fit.
        """
        self._phi, self._solved, self.rows_M = phi, solved, rows_M
        self.own_M = solved.own_M  # what the fit says of the rows that it saw

    def of(self, rows_G: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], Tensor]:
        """Return a function of places in `rows_G`: what a fit without these rows, labelled or not, says of them.

        Float64, 0 where no row is left to fit to.
        """
        solved = self._solved
        order_M = np.argsort(self.rows_M, kind="stable")
        found_G = np.minimum(np.searchsorted(self.rows_M, rows_G, sorter=order_M), len(order_M) - 1)
        place_G = np.where(self.rows_M[order_M[found_G]] == rows_G, order_M[found_G], -1)
        # Of the rows that the fit saw all is known already.
        said_G, others = solved.own_M[place_G], np.flatnonzero(place_G < 0)
        phi_UL = self._phi(rows_G[others]) if len(others) else said_G[:0, None]
        if len(others):
            said_G[others] = solved.say(phi_UL)
        hat = solved.hat(place_G, phi_UL)
        num_rows = len(self.rows_M)
        residual_M = solved.residual_M

        def without(out: NDArray[np.int64]) -> Tensor:
            is_fitted = place_G[out] >= 0
            fitted = out[is_fitted]
            if len(fitted) == num_rows:
                return torch.zeros_like(said_G[out])
            # Leaving out rows S: e_S = (I - H_SS)^-1 r_S, and what is said of any row u changes by -H_uS e_S.
            hat_GS = hat(out, fitted)
            system_SS = -hat_GS[torch.from_numpy(is_fitted)]
            system_SS.diagonal().add_(1.0)
            moved_G: Tensor = hat_GS @ torch.linalg.solve(system_SS, residual_M[place_G[fitted]])
            return said_G[out] - moved_G

        return without
