"""Intervals of scores: how far a label may be from a score, at a coverage that is asked for.

Conformal by whole groups: the images of a prompt resemble each other, so a group, not a row, is what a fresh group is
exchangeable with (Dunn, Wasserman, Ramdas, JASA 2022; Lee, Barber, Willett, arXiv:2306.06342). Errors are measured in
units of an expected error, so that intervals are wider where errors are (Lei et al., JASA 2018, section 5.2). What is
expected depends on the score and on the source of the row: where nobody says it, on what the row looks like.
Knows arrays alone. Must not know heads, where scores come from, or files.

Guaranteed is the coverage of one row of a fresh group, on average over all that may come, where groups are drawn alike
and what is calibrated on was never learned from. Left-out scores, an expected error that was fitted to the same rows,
and the coverage of every single source are beyond that: they are measured, not guaranteed.

Shapes: N rows, Q points of a curve, C coordinates of a row, K sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.pipeline.scoring.groups import mix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from deltaclip.pipeline.scoring.agreement import FloatArray
    from deltaclip.pipeline.scoring.groups import KeyArray

# Points of a curve that are kept: levels are met within 1 / MAX_POINTS, always from above.
MAX_POINTS = 1024
# A source with fewer groups than this says too little of its own errors; its rows count as of no source.
MIN_GROUPS, MAX_SOURCES = 10, 64
# An expected error is at most this much below or above the mean one: an interval is never a point.
LEAST, MOST = 0.2, 3.0
FOLDS = 5
# Of a class' covariance towards a round one: 48 coordinates of 200 rows are no full matrix.
ROUND = 0.1
STRENGTHS = tuple(10.0**k for k in range(-1, 5))


# ---- How far scores were off, as a curve over levels


class Curve(NamedTuple):
    """`error_Q`, rising: with the mass `mass_Q` of a fresh group's rows an error is at most that."""

    error_Q: FloatArray
    mass_Q: FloatArray

    def at(self, coverage: float) -> float:
        """Return the error that is not exceeded with this coverage, infinity where the groups are too few to say."""
        place = int(np.searchsorted(self.mass_Q, coverage - 1e-9))
        return float(self.error_Q[place]) if place < len(self.error_Q) else float("inf")


def group_curve(error_N: FloatArray, groups_N: NDArray[Any]) -> Curve:
    """Return the curve of errors: of G groups each has the mass 1 / (G + 1), shared among its rows.

    The last share is that of the fresh group itself, whose error may be anything. Over MAX_POINTS points, every level
    takes the next one above.
    """
    _, code_N, size_G = np.unique(groups_N, return_inverse=True, return_counts=True)
    order = np.argsort(error_N, kind="stable")
    mass_N = np.cumsum(1 / ((len(size_G) + 1) * size_G[code_N[order]]))
    kept = np.unique(np.linspace(0, len(order) - 1, MAX_POINTS).astype(np.int64))
    # Errors at the ends of runs of equal ones have the mass of all of them.
    ends = np.searchsorted(error_N[order], error_N[order][kept], side="right") - 1
    ends = np.unique(ends)
    return Curve(error_N[order][ends].astype(np.float64), mass_N[ends])


# ---- Which source a row looks like


@dataclass(frozen=True)
class Sources:
    """Linear discriminants with a shared covariance (Fisher 1936): P(source | coordinates), by Bayes' rule.

    `key_K` uint64 are the sources' names as `group_keys` gives them, so that no name is stored.
    """

    key_K: KeyArray
    weight_CK: FloatArray
    offset_K: FloatArray

    def guess(self, coordinates_NC: NDArray[np.floating]) -> FloatArray:
        """Return the probability of each source, (N, K); rows sum to 1."""
        logit_NK = np.asarray(coordinates_NC, dtype=np.float64) @ self.weight_CK + self.offset_K
        share_NK = np.exp(logit_NK - logit_NK.max(axis=1, keepdims=True, initial=-np.inf))
        return np.asarray(share_NK / share_NK.sum(axis=1, keepdims=True))

    def told(self, source_N: KeyArray) -> FloatArray:
        """Return 1 for the source that a row is known to be of, (N, K); 0 everywhere for one that is not among them."""
        return np.asarray(source_N[:, None] == self.key_K, dtype=np.float64)


def _fit_sources(coordinates_NC: NDArray[np.floating], code_N: NDArray[np.int64], key_K: KeyArray) -> Sources:
    """Fit discriminants to rows of which `code_N` indexes `key_K`, -1 of no source."""
    known = code_N >= 0
    x_NC, code = np.asarray(coordinates_NC[known], dtype=np.float64), code_N[known]
    size_K = np.maximum(np.bincount(code, minlength=len(key_K)), 1)
    mean_KC = np.stack([np.bincount(code, column, len(key_K)) for column in x_NC.T], axis=1) / size_K[:, None]
    within_NC = x_NC - mean_KC[code]
    cov_CC = within_NC.T @ within_NC / max(len(x_NC), 1)
    cov_CC = (1 - ROUND) * cov_CC + np.diag(ROUND * np.diag(cov_CC) + 1e-9 * (1 + np.trace(cov_CC)))
    weight_CK = np.linalg.solve(cov_CC, mean_KC.T)
    offset_K = np.log(size_K / size_K.sum()) - 0.5 * (mean_KC.T * weight_CK).sum(axis=0)
    return Sources(key_K, np.asarray(weight_CK, dtype=np.float64), np.asarray(offset_K, dtype=np.float64))


def telling_sources(source_N: KeyArray, groups_N: NDArray[np.int64]) -> tuple[KeyArray, NDArray[np.int64]]:
    """Return the sources with groups enough, and the code of each row, -1 where it is of none of them.

    A single source tells nothing; of more than MAX_SOURCES those with the most groups are taken.
    """
    key_K, code_N = np.unique(source_N, return_inverse=True)
    pairs = np.unique(np.stack([code_N, groups_N], axis=1), axis=0)
    groups_K = np.bincount(pairs[:, 0], minlength=len(key_K))
    kept = np.sort(np.argsort(-groups_K, kind="stable")[:MAX_SOURCES])
    kept = kept[groups_K[kept] >= MIN_GROUPS]
    if len(kept) < 2:
        return key_K[:0], np.full(len(groups_N), -1)
    place_K = np.full(len(key_K), -1)
    place_K[kept] = np.arange(len(kept))
    return key_K[kept], place_K[code_N]


# ---- Intervals


class Reach(NamedTuple):
    """An expected error, linear in the features of `_features` around its mean `error`, and errors in units of it."""

    error: float
    shift_F: FloatArray
    weight_F: FloatArray
    curve: Curve

    def of(self, feature_NF: FloatArray, coverage: float) -> FloatArray:
        """Return how far intervals reach on both sides, (N,)."""
        return np.asarray(self._expected(feature_NF) * self.curve.at(coverage))

    def _expected(self, feature_NF: FloatArray) -> FloatArray:
        return _within(self.error + (feature_NF - self.shift_F) @ self.weight_F, self.error)


def _fit_reach(feature_MF: FloatArray, error_M: FloatArray, groups_M: NDArray[np.int64]) -> Reach:
    # All labels met exactly: an expected error of 0 is nothing to measure in.
    mean = max(float(error_M.mean()), 1e-4)
    weight_F, left_out_M = _ridge(feature_MF, error_M, groups_M)
    curve = group_curve(error_M / _within(left_out_M, mean), groups_M)
    return Reach(mean, feature_MF.mean(axis=0), weight_F, curve)


def _within(expected_N: FloatArray, mean: float) -> FloatArray:
    return np.clip(expected_N, LEAST * mean, MOST * mean)


@dataclass(frozen=True)
class Intervals:
    """How far intervals of one target reach: of rows whose source is guessed or of none, and of those where it is told.

    `num_groups` are those that it was calibrated on.
    """

    guessed: Reach
    told: Reach | None
    sources: Sources | None
    num_groups: int

    @property
    def most(self) -> float:
        """The largest coverage that the groups allow an interval for that is not all of [0, 1]."""
        return float(self.guessed.curve.mass_Q[-1])

    def bounds(
        self,
        score_N: NDArray[np.floating],
        coordinates_NC: NDArray[np.floating],
        *,
        coverage: float,
        source_N: KeyArray | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the lower and upper ends of the intervals, (N,) float32 each: 0 <= low <= score <= high <= 1.

        Args:
            score_N: scores in [0, 1]; where they are NaN the ends are too.
            coordinates_NC: of the rows, as those that were fitted to.
            coverage: share of labels that is to lie inside, in (0, 1).
            source_N: keys of the sources where they are known.

        Raises:
            ValueError: the coverage is out of range.
        """
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must lie between 0 and 1, not {coverage}")
        score = np.asarray(score_N, dtype=np.float64)
        guess_NK = None if self.sources is None else self.sources.guess(coordinates_NC)
        reach_N = self.guessed.of(_features(score, guess_NK), coverage)
        if self.sources is not None and self.told is not None and source_N is not None:
            told_NK = self.sources.told(source_N)
            told_N = told_NK.any(axis=1)
            reach_N[told_N] = self.told.of(_features(score[told_N], told_NK[told_N]), coverage)
        low, high = (np.clip(score + sign * reach_N, 0, 1).astype(np.float32) for sign in (-1, 1))
        rounded = score.astype(np.float32)  # the ends hold the score as it is written, too
        return np.minimum(low, rounded), np.maximum(high, rounded)


def fit_intervals(
    score_N: NDArray[np.floating],
    label_N: NDArray[np.floating],
    groups_N: NDArray[Any],
    coordinates_NC: NDArray[np.floating],
    *,
    source_N: KeyArray | None = None,
    ratio: float = 1.0,
    seed: int = 0,
) -> Intervals | None:
    """Fit intervals to scores that were not learned from the labels beside them; None where no row has both.

    Args:
        score_N: honest scores in [0, 1], NaN where there is none.
        label_N: labels in [0, 1], NaN where missing.
        groups_N: what is exchangeable, strings or integers.
        coordinates_NC: what rows look like, few numbers each; a source is guessed from them.
        source_N: keys of the sources, None where the data names none.
        ratio: by which the errors of scores to come differ from these.
        seed: of the folds of whole groups, by which no row guesses its own source.
    """
    known = np.isfinite(score_N) & np.isfinite(label_N)
    if not known.any():
        return None
    score = np.asarray(score_N, dtype=np.float64)[known]
    error_M = np.abs(np.asarray(label_N, dtype=np.float64)[known] - score) * ratio
    groups_M = np.unique(np.asarray(groups_N)[known], return_inverse=True)[1].astype(np.int64)
    num_groups = int(groups_M.max()) + 1
    if source_N is None:
        return Intervals(_fit_reach(_features(score, None), error_M, groups_M), None, None, num_groups)
    coordinates_MC, source_M = np.asarray(coordinates_NC)[known], source_N[known]
    key_K, code_M = telling_sources(source_M, groups_M)
    if not len(key_K):
        return Intervals(_fit_reach(_features(score, None), error_M, groups_M), None, None, num_groups)
    sources, guess_MK = _fit_sources(coordinates_MC, code_M, key_K), np.empty((len(error_M), len(key_K)))
    for own_M in folds_of_groups(groups_M, seed):
        guess_MK[own_M] = _fit_sources(coordinates_MC[~own_M], code_M[~own_M], key_K).guess(coordinates_MC[own_M])
    told_MK, inside = sources.told(source_M), np.flatnonzero(code_M >= 0)
    return Intervals(
        _fit_reach(_features(score, guess_MK), error_M, groups_M),
        _fit_reach(_features(score, told_MK)[inside], error_M[inside], groups_M[inside]),
        sources,
        num_groups,
    )


def _features(score_N: FloatArray, source_NK: FloatArray | None) -> FloatArray:
    """Return what an expected error is linear in, (N, F): the score, its square, and the shares of sources."""
    own = [score_N[:, None], score_N[:, None] ** 2]
    return np.concatenate([*own, *([] if source_NK is None else [source_NK])], axis=1)


def folds_of_groups(groups_M: NDArray[np.int64], seed: int) -> Iterator[NDArray[np.bool_]]:
    """Yield the rows of each of FOLDS folds of whole groups."""
    fold_G = mix(np.arange(int(groups_M.max()) + 1, dtype=np.uint64), seed=seed) % np.uint64(FOLDS)
    for fold in range(FOLDS):
        yield np.asarray(fold_G[groups_M] == fold)


def _ridge(x_MF: FloatArray, y_M: FloatArray, groups_M: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
    """Return ridge weights on centred features, and what fits without a row's group say of it, (M,).

    The strength has the least squared error over left-out groups; with a single group nothing is weighed.
    """
    mean, num_rows = float(y_M.mean()), len(y_M)
    order = np.argsort(groups_M, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups_M[order])) + 1)
    if len(members) < 2:
        return np.zeros(x_MF.shape[1]), np.full(num_rows, mean)
    u_MF, s_F, v_FF = np.linalg.svd(x_MF - x_MF.mean(axis=0), full_matrices=False)
    along_F, best = u_MF.T @ (y_M - mean), (np.inf, np.zeros(x_MF.shape[1]), y_M)
    for strength in (*STRENGTHS, np.inf):
        kept_F = s_F**2 / (s_F**2 + strength)
        residual_M, left_out_M = y_M - mean - u_MF @ (kept_F * along_F), np.empty(num_rows)
        for rows in members:
            # Leaving out a group: e_g = (I - H_gg)^-1 r_g, H = 1/M + U diag(kept) U^T.
            hat = (u_MF[rows] * kept_F) @ u_MF[rows].T + 1 / num_rows
            left_out_M[rows] = y_M[rows] - np.linalg.solve(np.eye(len(rows)) - hat, residual_M[rows])
        error = float(((left_out_M - y_M) ** 2).mean())
        if error < best[0]:
            with np.errstate(divide="ignore", invalid="ignore"):
                per_F = np.where(s_F > 0, kept_F / s_F, 0.0)
            best = error, v_FF.T @ (per_F * along_F), left_out_M
    return best[1], best[2]
