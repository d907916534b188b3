"""A kernel base whose inputs include a score that was itself learned from labels.

Knows how the score is taken out of fold inside every fold that is left out, and the fit on it. Must not know where rows
come from; give it no test rows.

A left-out score falls as the labels of its own group rise, because these were taken from the fit. Where it stands
among the inputs of a second fit whose label goes along with the first, that second fit reads its own labels off it: on
AGIQA-3K with the bundled tower left-out rows came out at SROCC .54 and test rows at .15. So folds are nested: what is
said of a fold comes from fits, of both kernels, that never saw it, and their training rows have scores that saw neither
the fold nor their own.

Shapes: N rows, K folds, M rows with a label, U those with one of the score's, R outside a fold, L landmarks.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from deltaclip.pipeline.model.calibrate import Sums, fit_line
from deltaclip.pipeline.model.kernel import (
    STRENGTHS,
    Kernel,
    KernelFit,
    Part,
    chosen_marks,
    chosen_rows,
    landmark_root,
    scaled_kernel,
    squared_distances,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.pipeline.model.kernel import Refits

# A fold's fits see four fifths of the groups. More folds cost their square in fits of the score.
MAX_FOLDS = 5
# Where the walk over strengths begins: the best ones were .5 to 4 on all data tried.
_FIRST_STRENGTH = STRENGTHS.index(1.0)


class Score(NamedTuple):
    """A score of all rows (N,) float32, left out where its fit saw the row; its refits, and its weight as a part."""

    said_N: Tensor
    refits: Refits | None
    weight: float


class OnScore(NamedTuple):
    """f = slope * x + offset + kernel(parts, score), what it says of rows, and what was fitted.

    `said_N` (N,) float32 is the kernel's term alone: for a fitted row what a fit without its fold says beyond that
    line. `own_M` is f of the fitted rows `rows_M`, which it saw.
    """

    kernel: Kernel
    slope: float
    offset: float
    said_N: Tensor
    fit: KernelFit
    rows_M: NDArray[np.int64]
    own_M: Tensor


def deal_folds(groups_M: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """Return the fold of each row, (M,) from 0: whole groups, MAX_FOLDS folds of about as many rows, or one each."""
    _, code_M, size_G = np.unique(groups_M, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(size_G))
    rows_K, fold_G = np.zeros(min(MAX_FOLDS, len(size_G)), dtype=np.int64), np.empty(len(size_G), dtype=np.int64)
    for group in order[np.argsort(-size_G[order], kind="stable")]:
        fold_G[group] = np.argmin(rows_K)
        rows_K[fold_G[group]] += size_G[group]
    return np.asarray(fold_G[code_M])


def nested_scores(
    score: Score, rows_M: NDArray[np.int64], fold_M: NDArray[np.int64], groups_N: NDArray[np.int64]
) -> Tensor:
    """Return the scores (K + 1, M) of rows of K folds, float64, each from a fit that never saw the row.

    Line k < K is what all rows may have where fold k is left out: no label of that fold is in it, and none of the row's
    own fold. Line K is for a fit to all rows. With fewer than three folds nothing is left to fit the score to, and it
    is 0. A fold leaves the score's fit with its groups, also with rows of these that have no label here. The strength
    of that fit is the one chosen on all rows, one of ten.
    """
    num_folds = int(fold_M.max()) + 1
    found_KM = torch.zeros(num_folds + 1, len(rows_M), dtype=torch.float64, device=score.said_N.device)
    if score.refits is None or num_folds < 3:
        return found_KM
    group_G, place_G = np.unique(groups_N[rows_M], return_index=True)
    others = np.setdiff1d(score.refits.rows_M, rows_M)
    others = others[np.isin(groups_N[others], group_G)]
    fold_U = np.concatenate([fold_M, fold_M[place_G[np.searchsorted(group_G, groups_N[others])]]])
    without = score.refits.of(np.concatenate([rows_M, others]))
    found_KU = found_KM.new_zeros(num_folds + 1, len(fold_U))
    for first in range(num_folds):
        own = np.flatnonzero(fold_U == first)
        found_KU[:, own] = without(own)
        for second in range(first):
            both = np.flatnonzero((fold_U == first) | (fold_U == second))
            said_G, of_first = without(both), fold_U[both] == first
            found_KU[second, both[of_first]] = said_G[of_first]
            found_KU[first, both[~of_first]] = said_G[~of_first]
    return found_KU[:, : len(rows_M)]


def fit_kernel_on_score(
    parts: Sequence[Part], score: Score, label_N: Tensor, groups_N: NDArray[np.int64], *, x_N: Tensor, seed: int
) -> OnScore:
    """Fit a line on x, then a kernel on parts and score to what the line leaves, in float64.

    Args:
        parts: vectors of all rows, with nothing in them that was learned from labels.
        score: what the kernel sees besides.
        label_N: targets; NaN = missing, not fitted to. At least two groups have one.
        groups_N: rows of one group are in one fold.
        x_N: one number of each row, for the line.
        seed: of folds, and of rows and landmarks where there are too many.

    Raises:
        UserError: vectors that are not finite.
    """
    generator = np.random.default_rng(seed)
    rows_M = chosen_rows(~torch.isnan(label_N), groups_N, generator)
    fold_M = deal_folds(groups_N[rows_M], seed=seed)
    marks_L = chosen_marks(len(rows_M), generator)
    score_KM = nested_scores(score, rows_M, fold_M, groups_N)
    y_M, x_M = label_N[rows_M].double(), x_N[rows_M].double()
    parts_M = [part._replace(vector_NW=part.vector_NW[rows_M]) for part in parts]
    last_M1 = score_KM[-1].float()[:, None]
    kernel = scaled_kernel([*parts_M, Part(last_M1, score.weight)])
    point_MP = kernel.scaled(torch.cat([*(part.vector_NW for part in parts_M), last_M1], dim=1))
    a_MP = point_MP[:, :-1].double()
    rows = _Rows(squared_distances(a_MP, a_MP[marks_L]), marks_L, x_M, y_M)
    folds = [_fitting(rows, score_M, score.weight, fold_M != number) for number, score_M in enumerate(score_KM[:-1])]

    def left_out(strength: float) -> Tensor:
        said_M = torch.empty_like(y_M)
        for number, fold in enumerate(folds):
            own = np.flatnonzero(fold_M == number)
            said_M[own] = fold.say(own, strength)
        return said_M

    strength = _best_strength(lambda one: float((left_out(one) - y_M).square().mean()))
    whole, left_out_M = _fitting(rows, score_KM[-1], score.weight, fold_M >= 0), left_out(strength)
    beta_L, intercept = whole.solve(strength)
    kernel.points_LP, kernel.beta_L, kernel.intercept = point_MP[marks_L], beta_L.float(), intercept.float()
    point_NP = torch.cat([*(part.vector_NW for part in parts), score.said_N[:, None]], dim=1)
    with torch.no_grad():
        said_N = torch.cat([kernel(block) for block in point_NP.split(4096)])
    said_N[torch.from_numpy(rows_M)] = (left_out_M - whole.line_M).float()
    fit = KernelFit(len(rows_M), len(marks_L), strength, float((left_out_M - y_M).square().mean().sqrt()))
    own_M = whole.say(np.arange(len(rows_M)), strength)
    return OnScore(kernel, whole.slope, whole.offset, said_N, fit, rows_M, own_M)


def _best_strength(error: Callable[[float], float]) -> float:
    """Walk to the strength whose neighbours are no better, as each costs the cube of the landmarks."""
    error = functools.cache(error)
    here = _FIRST_STRENGTH
    while True:
        near = [one for one in (here, here + 1, here - 1) if 0 <= one < len(STRENGTHS)]
        best = min(near, key=lambda one: error(STRENGTHS[one]))  # of equals the first, which is here
        if best == here:
            return STRENGTHS[here]
        here = best


class _Rows(NamedTuple):
    """What all fits share: squared distances of rows to landmarks without the score, which rows these are, x and y."""

    base_ML: Tensor
    marks_L: NDArray[np.int64]
    x_M: Tensor
    y_M: Tensor


class _Fitting(NamedTuple):
    """A line that was fitted, and a kernel that can be for any strength: (weights of its landmarks, intercept)."""

    slope: float
    offset: float
    line_M: Tensor
    k_ML: Tensor
    solve: Callable[[float], tuple[Tensor, Tensor]]

    def say(self, rows_G: NDArray[np.int64], strength: float) -> Tensor:
        beta_L, intercept = self.solve(strength)
        return self.line_M[rows_G] + self.k_ML[rows_G] @ beta_L + intercept


def _fitting(rows: _Rows, score_M: Tensor, weight: float, is_seen_M: NDArray[np.bool_]) -> _Fitting:
    """Fit the line to the seen rows, and prepare the kernel; landmarks are those among them."""
    seen, is_seen_L = np.flatnonzero(is_seen_M), is_seen_M[rows.marks_L]
    sums = Sums.zeros(1, rows.x_M.device)
    sums.add(rows.x_M[seen][:, None], rows.y_M[seen])
    slope, offset = fit_line(sums)
    line_M = slope * rows.x_M + offset
    # Two seen rows are `weight` apart in the mean, squared, as in `scaled_kernel`.
    spread = 2 * score_M[seen].var(correction=0)
    scaled_M = score_M * torch.where(spread > 0, weight / spread.clamp(min=1e-30), 0.0).sqrt()
    marks = rows.marks_L[is_seen_L]
    step_ML = scaled_M[:, None] - scaled_M[marks]
    k_ML = torch.exp(-(rows.base_ML[:, torch.from_numpy(is_seen_L)] + step_ML.square()))
    target_R = (rows.y_M - line_M)[seen]
    solve = _exact(k_ML[seen], target_R) if len(marks) == len(seen) else _nystroem(k_ML[seen], k_ML[marks], target_R)
    return _Fitting(slope, offset, line_M, k_ML, solve)


def _exact(k_RR: Tensor, y_R: Tensor) -> Callable[[float], tuple[Tensor, Tensor]]:
    """Return the solver of (K + strength I) beta = y - intercept, sum(beta) = 0: every row is a landmark."""
    right_R2 = torch.stack([y_R, torch.ones_like(y_R)], dim=1)

    def solve(strength: float) -> tuple[Tensor, Tensor]:
        system_RR = k_RR.clone()
        system_RR.diagonal().add_(strength)
        to_y_R, to_one_R = torch.cholesky_solve(right_R2, torch.linalg.cholesky(system_RR)).T
        intercept = to_y_R.sum() / to_one_R.sum()
        return to_y_R - intercept * to_one_R, intercept

    return functools.cache(solve)


def _nystroem(k_RL: Tensor, k_LL: Tensor, y_R: Tensor) -> Callable[[float], tuple[Tensor, Tensor]]:
    """Return the solver of ridge on the features of landmarks, less their means, as in `fit_kernel`."""
    mean, mean_L, c_LL = y_R.mean(), k_RL.mean(dim=0), landmark_root(k_LL)
    phi_LR = torch.linalg.solve_triangular(c_LL, (k_RL - mean_L).T, upper=False)
    gram_LL, right_L1 = phi_LR @ phi_LR.T, (phi_LR @ (y_R - mean))[:, None]

    def solve(strength: float) -> tuple[Tensor, Tensor]:
        system_LL = gram_LL.clone()
        system_LL.diagonal().add_(strength)
        weight_L1 = torch.cholesky_solve(right_L1, torch.linalg.cholesky(system_LL))
        beta_L = torch.linalg.solve_triangular(c_LL.T, weight_L1, upper=True)[:, 0]
        return beta_L, mean - mean_L @ beta_L

    return functools.cache(solve)
