"""What a textbook would fit to cached embeddings: ridge and a support vector machine, one label at a time.

Knows feature matrices, labels with gaps and groups; the only place that knows scikit-learn. Must not know caches,
splits or metrics: how good predictions of validation rows are, the caller says.

Shapes: N training rows, M other rows, F features, G groups, R rank.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    LabelArray = NDArray[np.floating]
    Judge = Callable[[FloatArray, FloatArray], float]

# Strengths in units of the mean squared norm of the centred rows, as in `calibrate`: half decades from an all but exact
# fit to an all but constant one.
RELATIVE_STRENGTHS = tuple(10 ** (k / 2) for k in range(-8, 9))
# Thirteen times the features of consistency at D = 768; the fit and all strengths take 7 s and 1.7 GB there.
MAX_RIDGE_ROWS = 20_000
# The solver's time grows with the square of the rows and more: 2.2 s for the whole grid at 4,000.
MAX_SVR_ROWS = 4_000
# In units of the labels' SD, as labels are standardised too. On the demo set the best of a larger grid (six penalties,
# four widths) lay within 0.03 of the best of these on validation; two splits differ by more.
PENALTIES = (0.3, 1.0, 3.0, 10.0)
TUBES = (0.1, 0.5)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A fitted baseline: predictions of rows of F features, and what was chosen."""

    predict: Callable[[FloatArray], FloatArray]
    num_rows: int
    chosen: dict[str, float]


def fit_ridge_regression(x_NF: FloatArray, y_N: LabelArray, groups_N: NDArray[np.generic]) -> Baseline:
    """Fit y = w . x + b with a penalty on w alone, its strength chosen by leave-group-out on these very rows.

    The error of a group that was left out follows from one fit to all rows: e_g = (I - H_gg)^-1 (y_g - f_g), H the hat
    matrix (Cook and Weisberg 1982, section 4.4; exact for ridge with a free intercept). Leaving out single rows would
    choose too weak a penalty, as rows of one prompt share their text embedding.

    Args:
        x_NF: features, finite.
        y_N: labels; rows where it is NaN are left out. At least one must be there.
        groups_N: (N,) the group of each row; a single group is left out row by row.
    """
    x_NF, y_N, groups_N = _labelled(x_NF, y_N, groups_N, most=MAX_RIDGE_ROWS)
    mean_F, mean = x_NF.mean(axis=0), float(y_N.mean())
    centred_NF, centred_N = x_NF - mean_F, y_N - mean
    e_R, z_NR, v_FR = _principal(centred_NF)
    if e_R.size == 0 or np.ptp(y_N) == 0:
        return Baseline(predict=lambda x_MF: np.full(len(x_MF), mean), num_rows=len(y_N), chosen={})
    unit = float(e_R.sum()) / len(y_N)
    strengths = [unit * relative for relative in RELATIVE_STRENGTHS]
    errors = [_left_out_error(z_NR, centred_N, e_R + strength, groups_N) for strength in strengths]
    best = int(np.argmin(errors))
    w_F = v_FR @ ((z_NR.T @ centred_N) / (e_R + strengths[best]))
    return Baseline(
        predict=lambda x_MF: np.asarray((x_MF - mean_F) @ w_F + mean),
        num_rows=len(y_N),
        chosen={"strength": strengths[best], "relative_strength": RELATIVE_STRENGTHS[best]},
    )


def _principal(x_NF: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return e (R,), z = x v (N, R) and v (F, R) of x'x = v diag(e) v', without directions that hold rounding alone.

    By the smaller of x'x and xx', which have the same e above 0.
    """
    wide = x_NF.shape[0] < x_NF.shape[1]
    e, basis = np.linalg.eigh(x_NF @ x_NF.T if wide else x_NF.T @ x_NF)
    kept = e > 1e-12 * max(float(e[-1]), 1e-300)
    e_R, basis = e[kept], basis[:, kept]
    if wide:
        return e_R, basis * np.sqrt(e_R), (x_NF.T @ basis) / np.sqrt(e_R)
    return e_R, x_NF @ basis, basis


def _left_out_error(z_NR: FloatArray, y_N: FloatArray, penalised_R: FloatArray, groups_N: NDArray[np.int64]) -> float:
    """Return the sum of squared errors of all rows, each predicted without its group; numbers from 0, none empty."""
    # H = 1/N + z diag(1 / (e + strength)) z', of which only the blocks of the groups are needed.
    residual_N = y_N - z_NR @ ((z_NR.T @ y_N) / penalised_R)
    size_G = np.bincount(groups_N)
    order = np.argsort(size_G[groups_N] * len(y_N) + groups_N, kind="stable")  # group after group, small ones first
    error, start = 0.0, 0
    for size, count in zip(*np.unique(size_G, return_counts=True), strict=True):
        rows_Gn = order[start : start + size * count].reshape(count, size)
        start += size * count
        z_GnR = z_NR[rows_Gn]
        left_Gnn = np.eye(size) - 1 / len(y_N) - (z_GnR / penalised_R) @ z_GnR.transpose(0, 2, 1)
        error += float(np.square(np.linalg.solve(left_Gnn, residual_N[rows_Gn][..., None])).sum())
    return error


def fit_svr(x_NF: FloatArray, y_N: LabelArray, *, validation: tuple[FloatArray, LabelArray], judge: Judge) -> Baseline:
    """Fit scikit-learn's SVR with an RBF kernel on standardised features and labels.

    gamma is 'scale', which is 1 / F of standardised features; C and epsilon are those of the grid that `judge` likes
    best on validation rows (higher is better; the first of equals).

    Args:
        x_NF: features, finite.
        y_N: labels; rows where it is NaN are left out. At least one must be there.
        validation: (M, F) features and (M,) labels to choose by.
        judge: called with predictions and labels of the labelled validation rows.
    """
    from sklearn.svm import SVR

    x_NF, y_N, _ = _labelled(x_NF, y_N, np.zeros(len(y_N), dtype=np.int64), most=MAX_SVR_ROWS)
    mean_F, sd_F, mean, sd = x_NF.mean(axis=0), x_NF.std(axis=0), float(y_N.mean()), float(y_N.std())
    sd_F[sd_F < 1e-12] = 1.0  # a feature that does not vary is 0 everywhere
    if np.ptp(y_N) == 0:
        return Baseline(predict=lambda x_MF: np.full(len(x_MF), mean), num_rows=len(y_N), chosen={})
    scaled_NF, scaled_N = (x_NF - mean_F) / sd_F, (y_N - mean) / sd
    gamma = 1 / (x_NF.shape[1] * max(float(scaled_NF.var()), 1e-12))

    def kernel(x_MF: FloatArray) -> FloatArray:
        return _rbf((x_MF - mean_F) / sd_F, scaled_NF, gamma)

    x_val_MF, y_val_M, _ = _labelled(*validation, np.zeros(len(validation[1]), dtype=np.int64), most=MAX_SVR_ROWS)
    # The kernel is computed once for the whole grid, by matrix products: a fit of 4,000 rows then takes 0.3 s, and 7 s
    # where the solver computes it.
    train_NN, val_MN = _rbf(scaled_NF, scaled_NF, gamma), kernel(x_val_MF)
    best, fitted, chosen = -np.inf, None, {}
    for penalty, tube in itertools.product(PENALTIES, TUBES):
        machine = SVR(kernel="precomputed", C=penalty, epsilon=tube).fit(train_NN, scaled_N)
        score = judge(machine.predict(val_MN) * sd + mean, y_val_M)
        if fitted is None or score > best:
            best, fitted, chosen = score, machine, {"C": penalty, "epsilon": tube}
    assert fitted is not None
    return Baseline(
        predict=lambda x_MF: np.asarray(fitted.predict(kernel(x_MF)) * sd + mean), num_rows=len(y_N), chosen=chosen
    )


def _rbf(a_MF: FloatArray, b_NF: FloatArray, gamma: float) -> FloatArray:
    """Return exp(-gamma |a - b|^2) of every pair of rows, (M, N)."""
    squares_MN = (a_MF**2).sum(axis=1)[:, None] + (b_NF**2).sum(axis=1) - 2 * (a_MF @ b_NF.T)
    return np.asarray(np.exp(-gamma * np.maximum(squares_MN, 0)))


def _labelled(
    x_NF: FloatArray, y_N: LabelArray, groups_N: NDArray[np.generic], *, most: int
) -> tuple[FloatArray, FloatArray, NDArray[np.int64]]:
    """Return the rows with a label, at most so many of them drawn at random, and their groups as numbers from 0."""
    rows = np.flatnonzero(~np.isnan(y_N))
    if rows.size == 0:
        message = "no row has a label to fit"
        raise ValueError(message)
    if rows.size > most:
        rows = np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
    code_N = np.unique(groups_N[rows], return_inverse=True)[1]
    if code_N.max() == 0:
        code_N = np.arange(rows.size)
    return np.asarray(x_NF, np.float64)[rows], np.asarray(y_N, np.float64)[rows], code_N
