"""Whether rows taken together are of a source that the training had, where no single one of them is strange.

A generator that was never rated makes pictures that single rows of rated ones could be: few of them lie outside. All
lie a little between the sources, and that a set of them tells. Of a row it is measured how much further it lies from
the source nearest to it than from the middle of all rows: the relative Mahalanobis distance (Ren et al.,
arXiv:2106.09022), as a rank among training rows whose group was left out. The mean rank of a set is held against that
of every source of the training, so that a set of one known source is as usual as a mixed one.
Knows arrays alone. Must not know what coordinates mean, or files.

Shapes: N rows, C coordinates, K sources, Q points of a distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.pipeline.scoring.conformal import folds_of_groups, telling_sources

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaclip.pipeline.scoring.agreement import FloatArray
    from deltaclip.pipeline.scoring.groups import KeyArray

# A mean of fewer groups is not as good as normal, and a dozen pictures tell nothing for sure.
MIN_SET = 10
# The point of the normal distribution that 99 of 100 sets of the strangest known source keep.
LIMIT = 2.326
# Of a covariance towards its diagonal: 195 coordinates of 200 rows are no full matrix.
ROUND = 0.1
MAX_POINTS = 1024


class Metric(NamedTuple):
    """Two ways to measure coordinates z = (x - shift) scale: covariance 1 within sources, and over all rows."""

    shift_C: NDArray[np.float32]
    scale_C: NDArray[np.float32]
    within_CC: NDArray[np.float32]
    overall_CC: NDArray[np.float32]
    mean_KC: NDArray[np.float32]

    def relative(self, coordinates_NC: NDArray[np.floating]) -> FloatArray:
        """Return the least squared distance to a source less that to the middle, (N,); NaN of rows with NaN."""
        z_NC = (np.asarray(coordinates_NC, dtype=np.float64) - self.shift_C) * self.scale_C
        own_NC, mean_KC = z_NC @ self.within_CC, self.mean_KC.astype(np.float64) @ self.within_CC
        square_NK = (own_NC**2).sum(axis=1)[:, None] + (mean_KC**2).sum(axis=1) - 2 * own_NC @ mean_KC.T
        return np.asarray(square_NK.min(axis=1) - ((z_NC @ self.overall_CC) ** 2).sum(axis=1))


class Usual(NamedTuple):
    """Of each source of the training: mean rank of its groups when left out, their SD, and how many there are."""

    mean_K: NDArray[np.float32]
    spread_K: NDArray[np.float32]
    count_K: NDArray[np.float32]

    def excess(self, rank_N: NDArray[np.floating], groups_N: NDArray[Any]) -> float | None:
        """Return how far a set of rows lies beyond all sources, more than 1 where it is unlike them together.

        Rows of one group, such as an image that is there twice, count as one. None of fewer than MIN_SET groups.
        """
        known = np.isfinite(rank_N)
        group_M = np.unique(np.asarray(groups_N)[known], return_inverse=True)[1]
        if not len(group_M) or (num_groups := int(group_M.max()) + 1) < MIN_SET:
            return None
        mean_G = np.bincount(group_M, rank_N[known]) / np.bincount(group_M)
        error_K = self.spread_K * np.sqrt(1 / num_groups + 1 / self.count_K)
        return float(((mean_G.mean() - self.mean_K) / error_K).min() / LIMIT)


@dataclass(frozen=True)
class SetLikeness:
    """How rows are measured, the measures of left-out training rows in rising order, and what is usual of sources."""

    metric: Metric
    left_out_Q: NDArray[np.float32]
    usual: Usual

    def rank(self, coordinates_NC: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return the share of left-out training rows that are less strange, (N,); NaN of rows with NaN."""
        return _rank(self.metric.relative(coordinates_NC), self.left_out_Q)


def fit_set_likeness(
    coordinates_NC: NDArray[np.floating], groups_N: NDArray[Any], source_N: KeyArray, *, seed: int = 0
) -> SetLikeness | None:
    """Fit to training rows; None where fewer than two sources have groups enough to be known by.

    Args:
        coordinates_NC: what rows look like, few numbers each.
        groups_N: what is exchangeable; left out as a whole.
        source_N: keys of the sources. Those with few groups count as one together.
        seed: of the folds of whole groups.
    """
    group_N = np.unique(groups_N, return_inverse=True)[1].astype(np.int64)
    key_K, code_N = telling_sources(source_N, group_N)
    if not len(key_K):
        return None
    x_NC, code_N = np.asarray(coordinates_NC, dtype=np.float64), np.where(code_N < 0, len(key_K), code_N)
    relative_N = np.empty(len(x_NC))
    for own_N in folds_of_groups(group_N, seed):
        if own_N.any():
            relative_N[own_N] = _fit_metric(x_NC[~own_N], code_N[~own_N]).relative(x_NC[own_N])
    points = np.unique(np.linspace(0, len(relative_N) - 1, MAX_POINTS).astype(np.int64))
    left_out_Q = np.sort(relative_N)[points].astype(np.float32)
    return SetLikeness(
        _fit_metric(x_NC, code_N), left_out_Q, _usual(_rank(relative_N, left_out_Q), group_N, code_N, len(key_K))
    )


def _rank(relative_N: FloatArray, left_out_Q: NDArray[np.float32]) -> NDArray[np.float32]:
    rank_N = (np.searchsorted(left_out_Q, relative_N) + 0.5) / (len(left_out_Q) + 1)
    return np.where(np.isfinite(relative_N), rank_N, np.nan).astype(np.float32)


def _usual(
    rank_N: NDArray[np.float32], group_N: NDArray[np.int64], code_N: NDArray[np.int64], num_sources: int
) -> Usual:
    found = []
    for code in range(num_sources):
        own_N = code_N == code
        group_M = np.unique(group_N[own_N], return_inverse=True)[1]
        mean_G = np.bincount(group_M, rank_N[own_N]) / np.bincount(group_M)
        # Ranks that are all alike are no proof that those of the next rows are.
        found.append((mean_G.mean(), max(float(mean_G.std(ddof=1)), 1e-2), len(mean_G)))
    return Usual(*(np.array(column, dtype=np.float32) for column in zip(*found, strict=True)))


def _fit_metric(x_NC: FloatArray, code_N: NDArray[np.int64]) -> Metric:
    shift_C, deviation_C = x_NC.mean(axis=0), x_NC.std(axis=0)
    varies_C = deviation_C > 1e-6 * deviation_C.max(initial=0)
    scale_C = np.where(varies_C, 1 / np.where(varies_C, deviation_C, 1), 0)
    z_NC = (x_NC - shift_C) * scale_C
    code_N = np.unique(code_N, return_inverse=True)[1]
    size_K = np.bincount(code_N)
    mean_KC = np.stack([np.bincount(code_N, column) for column in z_NC.T], axis=1) / size_K[:, None]
    parts = shift_C, scale_C, _whitening(z_NC - mean_KC[code_N]), _whitening(z_NC), mean_KC
    return Metric(*(part.astype(np.float32) for part in parts))


def _whitening(centred_NC: FloatArray) -> FloatArray:
    """Return W (C, C) with |x W|^2 = x S^-1 x^T, of the covariance S drawn towards its diagonal."""
    cov_CC = centred_NC.T @ centred_NC / len(centred_NC)
    cov_CC = (1 - ROUND) * cov_CC + np.diag(ROUND * np.diag(cov_CC) + 1e-6)
    return np.asarray(np.linalg.inv(np.linalg.cholesky(cov_CC)).T)
