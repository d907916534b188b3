"""A member of a base whose inputs may include a score that was itself learned from labels.

Knows how the score is taken out of fold inside every fold that is left out, and the fit on it. Must not know where rows
come from; give it no test rows.

A left-out score falls as the labels of its own group rise, because these were taken from the fit. Where it stands
among the inputs of a second fit whose label goes along with the first, that second fit reads its own labels off it: on
AGIQA-3K with the bundled tower left-out rows came out at SROCC .54 and test rows at .15. So folds are nested: what is
said of a fold comes from fits, of both, that never saw it, and their training rows have scores that saw neither the
fold nor their own.

Shapes: N rows, K folds, M rows with a label, U those with one of the score's, R outside a fold, L landmarks.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from deltaclip.pipeline.model.calibrate import Sums, fit_line
from deltaclip.pipeline.model.group_ridge import walk
from deltaclip.pipeline.model.kernel import (
    FIRST_STRENGTH,
    MAX_ROWS,
    STRENGTHS,
    Member,
    MemberFit,
    MemberKind,
    Part,
    Space,
    chosen_marks,
    chosen_rows,
    landmark_root,
    products,
    squared_distances,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

# A fold's fits see four fifths of the groups. More folds cost their square in fits of the score.
MAX_FOLDS = 5


class ScoreRefits(Protocol):
    """What fits of a score without some rows say of them, as `group_ridge.Refits`."""

    rows_M: NDArray[np.int64]

    def of(self, rows_G: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], Tensor]:
        """Return a function of places in `rows_G`."""


class Score(NamedTuple):
    """A score of all rows (N,) float32, left out where its fit saw the row, and its refits."""

    said_N: Tensor
    refits: ScoreRefits | None


class Nested(NamedTuple):
    """The rows that pairs are fitted to, their folds, and their scores in each fold (K + 1, M), see `nested_scores`.

    `seed` is of all that is drawn: rows, folds and landmarks.
    """

    rows_M: NDArray[np.int64]
    fold_M: NDArray[np.int64]
    score_KM: Tensor
    seed: int

    @classmethod
    def of(cls, score: Score, label_N: Tensor, groups_N: NDArray[np.int64], *, seed: int) -> Nested:
        """Deal the labelled rows, or as many as are fitted to, into folds."""
        rows_M = chosen_rows(~torch.isnan(label_N), groups_N, np.random.default_rng(seed), most=MAX_ROWS)
        fold_M = deal_folds(groups_N[rows_M], seed=seed)
        return cls(rows_M, fold_M, nested_scores(score, rows_M, fold_M, groups_N), seed)

    def fewer(self, groups_N: NDArray[np.int64], *, most: int) -> Nested:
        """Return at most so many rows, whole groups, in their folds; all where a fold would be empty."""
        if len(self.rows_M) <= most:
            return self
        of_M = torch.ones(len(self.rows_M), dtype=torch.bool)
        kept = chosen_rows(of_M, groups_N[self.rows_M], np.random.default_rng(self.seed), most=most)
        if len(np.unique(self.fold_M[kept])) < self.fold_M.max() + 1:
            return self
        return Nested(self.rows_M[kept], self.fold_M[kept], self.score_KM[:, torch.from_numpy(kept)], self.seed)


class OnScore(NamedTuple):
    """f = slope * x + offset + member(parts, score), what it says of rows, and what was fitted.

    `term_M` is what fits without a row's fold say of it beyond that line, `left_out_M` with it, `own_M` is f of the
    fitted rows `rows_M`, which it saw. Without parts and score there is no member.
    """

    member: Member | None
    slope: float
    offset: float
    term_M: Tensor
    left_out_M: Tensor
    fit: MemberFit
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
    of that fit is the one chosen on all rows, one of a dozen.
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


def fit_on_score(
    kind: MemberKind,
    parts: Sequence[Part],
    label_N: Tensor,
    nested: Nested,
    *,
    weight: float,
    x_N: Tensor,
    strength: float | None = None,
) -> OnScore:
    """Fit a line on x, then a member on parts and score to what the line leaves, in float64.

    Args:
        kind: `kernel`, or `line` for none.
        parts: vectors of all rows, with nothing in them that was learned from labels; none: the score alone.
        label_N: targets.
        nested: the rows, of at least two groups, their folds and scores.
        weight: of the score as a part; 0 leaves it out.
        x_N: one number of each row, for the line.
        strength: as of `fit_member`.

    Raises:
        UserError: vectors that are not finite.
    """
    rows_M, fold_M, score_KM, seed = nested
    y_M, x_M = label_N[rows_M].double(), x_N[rows_M].double()
    marks_L = chosen_marks(len(rows_M), np.random.default_rng(seed))
    given = [*parts, Part(_OfRows(rows_M, score_KM[-1]), weight)] if weight else list(parts)
    if not given:
        return _line_alone(y_M, x_M, nested)
    space = Space.of(kind, given, rows_M, marks_L)
    a_MP = space.scaled_MP[:, :-1] if weight else space.scaled_MP
    between = products if kind == "line" else lambda _, a_NP, b_LP: squared_distances(a_NP, b_LP).double()
    base_ML = between(kind, a_MP, a_MP[marks_L]) if a_MP.shape[1] else y_M.new_zeros(len(rows_M), len(marks_L))
    rows = _Rows(kind, base_ML, marks_L, x_M, y_M)
    folds = [_fitting(rows, score_M, weight, fold_M != number) for number, score_M in enumerate(score_KM[:-1])]

    def left_out(strength: float) -> Tensor:
        said_M = torch.empty_like(y_M)
        for number, fold in enumerate(folds):
            own = np.flatnonzero(fold_M == number)
            said_M[own] = fold.say(own, strength)
        return said_M

    if strength is None:
        strength = walk(
            lambda one: float((left_out(one) - y_M).square().mean()), STRENGTHS[kind], first=FIRST_STRENGTH[kind]
        )
    whole, left_out_M = _fitting(rows, score_KM[-1], weight, fold_M >= 0), left_out(strength)
    beta_L, intercept = whole.solve(strength)
    return OnScore(
        member=space.of_marks(beta_L, intercept),
        slope=whole.slope,
        offset=whole.offset,
        term_M=left_out_M - whole.line_M,
        left_out_M=left_out_M,
        fit=MemberFit(len(rows_M), space.num_points, strength, float((left_out_M - y_M).square().mean().sqrt())),
        rows_M=rows_M,
        own_M=whole.say(np.arange(len(rows_M)), strength),
    )


def _line_alone(y_M: Tensor, x_M: Tensor, nested: Nested) -> OnScore:
    """Return least squares on x."""

    def line(seen_M: NDArray[np.bool_]) -> tuple[float, float]:
        sums = Sums.zeros(1, x_M.device)
        sums.add(x_M[seen_M][:, None], y_M[seen_M])
        return fit_line(sums)

    left_out_M = torch.empty_like(y_M)
    for number in range(int(nested.fold_M.max()) + 1):
        own_M = nested.fold_M == number
        slope, offset = line(~own_M)
        left_out_M[own_M] = slope * x_M[own_M] + offset
    slope, offset = line(nested.fold_M >= 0)
    line_M = slope * x_M + offset
    fit = MemberFit(len(y_M), 0, 0.0, float((left_out_M - y_M).square().mean().sqrt()))
    return OnScore(None, slope, offset, left_out_M - line_M, left_out_M, fit, nested.rows_M, line_M)


class _OfRows:
    """A number of some rows, as vectors of all rows: of the others there is none."""

    def __init__(self, rows_M: NDArray[np.int64], value_M: Tensor) -> None:
        self._place = dict(zip(rows_M.tolist(), range(len(rows_M)), strict=True))
        self._value_M = value_M

    def __len__(self) -> int:
        return len(self._value_M)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._value_M[[self._place[row] for row in rows.tolist()]].float()[:, None]


class _Rows(NamedTuple):
    """What all fits share: which rows are landmarks, products of rows with these without the score, x and y.

    Of a kernel the products are squared distances.
    """

    kind: MemberKind
    base_ML: Tensor
    marks_L: NDArray[np.int64]
    x_M: Tensor
    y_M: Tensor

    def with_score(self, score_M: Tensor, is_seen_L: NDArray[np.bool_]) -> Tensor:
        """Return the kernel of rows with the landmarks that are seen, (M, L), the score among its inputs."""
        base_ML, score_L = self.base_ML[:, torch.from_numpy(is_seen_L)], score_M[self.marks_L[is_seen_L]]
        if self.kind == "line":
            return base_ML + torch.outer(score_M, score_L)
        return torch.exp(-(base_ML + (score_M[:, None] - score_L).square()))


class _Fitting(NamedTuple):
    """A line that was fitted, and a member that can be for any strength: (weights of its landmarks, intercept)."""

    slope: float
    offset: float
    line_M: Tensor
    k_ML: Tensor
    solve: Callable[[float], tuple[Tensor, Tensor]]

    def say(self, rows_G: NDArray[np.int64], strength: float) -> Tensor:
        beta_L, intercept = self.solve(strength)
        return self.line_M[rows_G] + self.k_ML[rows_G] @ beta_L + intercept


def _fitting(rows: _Rows, score_M: Tensor, weight: float, is_seen_M: NDArray[np.bool_]) -> _Fitting:
    """Fit the line to the seen rows, and prepare the member; landmarks are those among them."""
    seen, is_seen_L = np.flatnonzero(is_seen_M), is_seen_M[rows.marks_L]
    sums = Sums.zeros(1, rows.x_M.device)
    sums.add(rows.x_M[seen][:, None], rows.y_M[seen])
    slope, offset = fit_line(sums)
    line_M = slope * rows.x_M + offset
    # Two seen rows are `weight` apart in the mean, squared, as in `scaled_points`.
    middle, spread = score_M[seen].mean(), 2 * score_M[seen].var(correction=0)
    scaled_M = (score_M - middle) * torch.where(spread > 0, weight / spread.clamp(min=1e-30), 0.0).sqrt()
    marks = rows.marks_L[is_seen_L]
    k_ML = rows.with_score(scaled_M, is_seen_L)
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
