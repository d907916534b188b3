"""Ranks and rank correlations of plain arrays, in numpy alone.

Knows how rows are masked, ranked and correlated; imports no scipy, because scipy.stats costs 0.7 s
on top of the 0.8 s of scipy.optimize and a training scores every epoch. Must not know splits, files or heads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float64]
    IntArray = npt.NDArray[np.int64]


def json_number(value: float) -> float | None:
    """Return the value as a float JSON can hold: None where it is NaN or infinite."""
    return float(value) if math.isfinite(value) else None


def labelled_rows(predicted_N: npt.ArrayLike, label_N: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Return the mask (N,) of rows that have a label; a label that is NaN is missing.

    Raises:
        ValueError: lengths differ, an array is not 1-D, a label is infinite, or a labelled row's prediction
            is not finite (such a row would silently poison every figure).
    """
    predicted, label = np.asarray(predicted_N), np.asarray(label_N, dtype=np.float64)
    if predicted.ndim != 1 or predicted.shape != label.shape:
        message = f"predictions {predicted.shape} and labels {label.shape} must be 1-D and of one length"
        raise ValueError(message)
    mask = ~np.isnan(label)
    for name, values in (("prediction", predicted), ("label", label)):
        bad = np.flatnonzero(mask & ~np.isfinite(values))
        if bad.size:
            message = f"{name} of row {bad[0]} is {values[bad[0]]} ({bad.size} such rows)"
            raise ValueError(message)
    return mask


def average_ranks(x_N: npt.ArrayLike) -> FloatArray:
    """Return ranks from 1 to N, equal values sharing the mean of their places (scipy's `average`)."""
    _, inverse, counts = np.unique(np.asarray(x_N), return_inverse=True, return_counts=True)
    ranks: FloatArray = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def pearson(x_N: npt.ArrayLike, y_N: npt.ArrayLike) -> float:
    """Return Pearson's correlation in [-1, 1], NaN where either side is constant or has no rows."""
    x, y = np.asarray(x_N, dtype=np.float64), np.asarray(y_N, dtype=np.float64)
    # Asked of the values, not of the deviations: the mean of a constant is not always that constant.
    if x.size == 0 or x.min() == x.max() or y.min() == y.max():
        return math.nan
    x, y = centred(x), centred(y)
    r = float((x @ y) / (np.linalg.norm(x) * np.linalg.norm(y)))
    return max(-1.0, min(1.0, r))


def centred(x_N: FloatArray) -> FloatArray:
    """Return values that are not constant with mean 0 and at most 1 in size, in their own proportions.

    Scaled before and after, so that squares of tiny or huge values stay in range; centred twice, because the
    first mean of nearly equal values is rounded by as much as they differ.
    """
    x = x_N / np.abs(x_N).max()
    x = x - x.mean()
    x = x / np.abs(x).max()
    return np.asarray(x - x.mean())


def srocc(x_N: npt.ArrayLike, y_N: npt.ArrayLike) -> float:
    """Return Spearman's rank correlation, exact with ties: Pearson's on average ranks (Spearman 1904).

    Args:
        x_N: predictions (N,), any real dtype; finite in rows with a label.
        y_N: labels (N,); NaN marks a missing one, its row is left out.

    Returns:
        The correlation in [-1, 1], or NaN with fewer than 3 labelled rows or a constant side.
    """
    mask = labelled_rows(x_N, y_N)
    if int(mask.sum()) < 3:
        return math.nan
    return pearson(average_ranks(np.asarray(x_N)[mask]), average_ranks(np.asarray(y_N)[mask]))


def krocc(x_N: npt.ArrayLike, y_N: npt.ArrayLike) -> float:
    """Return Kendall's tau-b, with Knight's O(N log N) count of discordant pairs (Kendall 1945; Knight 1966).

    Arguments and returns are those of `srocc`.
    """
    mask = labelled_rows(x_N, y_N)
    x = np.unique(np.asarray(x_N)[mask], return_inverse=True)[1].astype(np.int64)
    y = np.unique(np.asarray(y_N)[mask], return_inverse=True)[1].astype(np.int64)
    if x.size < 3 or x.max() == 0 or y.max() == 0:
        return math.nan
    # Rows sorted by x, equal x by y: a pair is then discordant exactly where a later y is strictly smaller.
    order = np.lexsort((y, x))
    place = np.empty(x.size, dtype=np.int64)
    place[np.argsort(y[order], kind="stable")] = np.arange(x.size)
    both = x * (y.max() + 1) + y
    pairs = x.size * (x.size - 1) // 2
    tied_x, tied_y, tied_both = (
        _tied_pairs(x),
        _tied_pairs(y),
        _tied_pairs(np.unique(both, return_inverse=True)[1]),
    )
    # concordant - discordant = pairs - tied_x - tied_y + tied_both - 2 discordant
    surplus = pairs - tied_x - tied_y + tied_both - 2 * _inversions(place)
    return max(-1.0, min(1.0, surplus / math.sqrt(pairs - tied_x) / math.sqrt(pairs - tied_y)))


def _tied_pairs(codes_N: IntArray) -> int:
    counts = np.bincount(codes_N)
    return int((counts * (counts - 1) // 2).sum())


def _inversions(values_N: IntArray) -> int:
    """Count pairs i < j with values_N[i] > values_N[j] of a permutation of 0 .. N-1.

    One stable radix pass per bit, highest first: a pair is counted at the first bit in which its values
    differ, where both still lie in one block, in their first order. A million rows take 20 passes.
    """
    values, position = values_N, np.arange(values_N.size)
    total = 0
    for bit in reversed(range(int(values.size - 1).bit_length())):
        is_one = (values >> bit) & 1
        ones = np.cumsum(is_one) - is_one
        start = (values >> (bit + 1)) << (bit + 1)  # a permutation: a block begins at its smallest value
        ones -= ones[start]
        total += int(ones[is_one == 0].sum())
        target = start + np.where(is_one == 1, (1 << bit) + ones, position - start - ones)
        moved = np.empty_like(values)
        moved[target] = values
        values = moved
    return total
