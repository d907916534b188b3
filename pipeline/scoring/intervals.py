"""How far a figure could have come out otherwise: bootstrap over rows or whole groups, and a t over repeats.

A resample is a vector of weights (how often each row was drawn) over rows that were sorted once. Its ranks
are running sums of weights, so no resample is sorted: 1,000 resamples of 500 rows take about 0.05 s. Over repeats there
is one difference each. Must not know heads, runs, splits or files.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from deltaclip.pipeline.scoring.agreement import json_number, labelled_rows, srocc
from deltaclip.pipeline.scoring.groups import group_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from deltaclip.pipeline.scoring.agreement import FloatArray, IntArray


# ---- How far a figure could have come out otherwise: bootstrap intervals and paired differences of SROCC


# Beyond this a resample costs more than it tells: the interval of 20,000 rows is already within +-0.01.
MAX_ROWS = 20_000
# Fewer groups than this would estimate their own spread badly, so no more are left out.
MIN_GROUPS = 200
# Numbers per block of resamples: 8 MB in float64, a few such arrays are alive at a time.
BLOCK = 1_000_000


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """SROCC of a minus SROCC of b on the same rows, its interval, and a two-sided p-value."""

    difference: float
    lo: float
    hi: float
    p_value: float

    def to_json(self) -> dict[str, float | None]:
        """Return the figures by name, NaN as None."""
        return {name: json_number(value) for name, value in asdict(self).items()}


def srocc_interval(
    predicted_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    *,
    resamples: int = 1000,
    seed: int,
    level: float = 0.95,
    groups: npt.ArrayLike | None = None,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of SROCC (Efron and Tibshirani 1993, chapter 13).

    Args:
        predicted_N: (N,) predictions, finite in rows with a label.
        label_N: (N,) labels; NaN marks a missing one.
        resamples: how many, at least 1.
        seed: any integer of at least 0.
        level: share of resamples inside the interval, in (0, 1).
        groups: (N,) strings or integers. Given, whole groups are drawn instead of rows (cluster bootstrap):
            rows of one prompt are not independent, and drawing them one by one makes the interval too narrow.

    Returns:
        (lo, hi), both NaN where SROCC does not exist or there is a single group. Over 20,000 rows the
        resamples are taken of a random part, and their spread is scaled to all rows, see `_part`.
    """
    point, drawn = _resampled([predicted_N], label_N, resamples=resamples, seed=seed, groups=groups)
    lo, hi = _percentiles(point[0], drawn[0], level=level)
    return max(lo, -1.0), min(hi, 1.0)


def paired_difference(
    pred_a_N: npt.ArrayLike,
    pred_b_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    resamples: int = 1000,
    seed: int,
    level: float = 0.95,
) -> PairedDifference:
    """Compare two predictions of the same rows, both scored on every resample.

    The p-value is twice the smaller share of resamples on one side of 0, counted with the sample itself:
    2 * min(#(d <= 0) + 1, #(d >= 0) + 1) / (resamples + 1), at most 1 (Davison and Hinkley 1997, section 4).
    Arguments are those of `srocc_interval`.
    """
    return _mean_paired_difference(
        [(pred_a_N, pred_b_N)], label_N, groups=groups, resamples=resamples, seed=seed, level=level
    )


def _mean_paired_difference(
    pairs: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
    label_N: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    resamples: int = 1000,
    seed: int,
    level: float = 0.95,
) -> PairedDifference:
    """Compare pairs of predictions of the same rows, a less b in each resample, and in the mean of the pairs."""
    flat = [predicted for both in pairs for predicted in both]
    point, drawn = _resampled(flat, label_N, resamples=resamples, seed=seed, groups=groups)
    difference = float(np.mean(point[::2]) - np.mean(point[1::2]))
    differences = np.mean(drawn[::2], axis=0) - np.mean(drawn[1::2], axis=0)
    lo, hi = _percentiles(difference, differences, level=level)
    finite = differences[np.isfinite(differences)]
    tail = 1 + min(int((finite <= 0).sum()), int((finite >= 0).sum()))
    p_value = min(1.0, 2 * tail / (finite.size + 1)) if math.isfinite(lo) else math.nan
    return PairedDifference(difference=difference, lo=lo, hi=hi, p_value=p_value)


def _percentiles(point: float, drawn_R: FloatArray, *, level: float) -> tuple[float, float]:
    finite = drawn_R[np.isfinite(drawn_R)]  # a resample of equal values has no SROCC
    if finite.size == 0 or not math.isfinite(point):
        return math.nan, math.nan
    # Values that were drawn, as many beyond each as the p-value counts: between two of them both could disagree.
    beyond = max(1, math.floor((finite.size + 1) * (1 - level) / 2 + 1e-9))
    ordered = np.sort(finite)
    return float(ordered[beyond - 1]), float(ordered[-beyond])


def _resampled(
    predictions: list[npt.ArrayLike],
    label_N: npt.ArrayLike,
    *,
    resamples: int,
    seed: int,
    groups: npt.ArrayLike | None,
) -> tuple[list[float], list[FloatArray]]:
    """Return SROCC of each prediction on all rows, and on every resample (the same draws for each)."""
    if resamples < 1:
        message = f"{resamples} resamples, at least 1 is needed"
        raise ValueError(message)
    mask = labelled_rows(predictions[0], label_N)
    points = [srocc(predicted, label_N) for predicted in predictions]
    y = np.asarray(label_N, dtype=np.float64)[mask]
    units = np.arange(y.size)
    if groups is not None:
        units = np.unique(group_keys(groups)[mask], return_inverse=True)[1].astype(np.int64)
    if y.size < 3 or units.max() == 0:
        return points, [np.full(resamples, math.nan) for _ in predictions]
    rng = np.random.default_rng(seed)
    rows, scale = _part(units, rng)
    unit = np.unique(units[rows], return_inverse=True)[1]
    xs = [np.asarray(predicted)[mask][rows] for predicted in predictions]
    drawn = _draw(xs, y[rows], unit, resamples=resamples, rng=rng)
    if rows.size == y.size:
        return points, drawn
    part_points = [srocc(x, y[rows]) for x in xs]
    triples = zip(points, part_points, drawn, strict=True)
    return points, [point + scale * (values - part) for point, part, values in triples]


def _part(unit_N: IntArray, rng: np.random.Generator) -> tuple[IntArray, float]:
    """Return the rows to resample, and the factor that takes their spread to that of all rows.

    All rows and 1, up to MAX_ROWS. Beyond, whole groups (single rows without groups) in random order until
    they hold MAX_ROWS rows, but at least MIN_GROUPS of them, with sqrt(groups kept / groups), since the
    spread falls with the square root of what is drawn (m out of n: Bickel, Goetze and van Zwet 1997). If
    those still hold more rows, rows are thinned at random within them, which errs towards a wide interval.
    """
    num_rows, num_units = unit_N.size, int(unit_N.max()) + 1
    if num_rows <= MAX_ROWS:
        return np.arange(num_rows), 1.0
    order = rng.permutation(num_units)
    held = np.cumsum(np.bincount(unit_N)[order])
    kept = min(num_units, max(MIN_GROUPS, int(np.searchsorted(held, MAX_ROWS, side="right"))))
    is_kept = np.zeros(num_units, dtype=bool)
    is_kept[order[:kept]] = True
    rows = np.flatnonzero(is_kept[unit_N])
    if rows.size > MAX_ROWS:
        rows = np.sort(rng.choice(rows, MAX_ROWS, replace=False))
    return rows, math.sqrt(kept / num_units)


def _draw(
    xs: list[npt.NDArray[np.generic]],
    y_N: FloatArray,
    unit_N: IntArray,
    *,
    resamples: int,
    rng: np.random.Generator,
) -> list[FloatArray]:
    """Return SROCC of each x with y on every resample of units, in blocks of bounded memory."""
    num_units = int(unit_N.max()) + 1
    sides = [_sorted_once(values) for values in (*xs, y_N)]
    blocks: list[list[FloatArray]] = []
    step = max(1, BLOCK // y_N.size)
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        drawn = rng.integers(num_units, size=(rows, num_units)) + np.arange(rows)[:, None] * num_units
        times = np.bincount(drawn.ravel(), minlength=rows * num_units).reshape(rows, num_units)
        weight_RN = times.astype(np.float64)[:, unit_N]
        *ranked, label = [_centred_ranks(weight_RN, side) for side in sides]
        blocks.append([_correlation(weight_RN, x, label) for x in ranked])
    return [np.concatenate(values) for values in zip(*blocks, strict=True)]


def _sorted_once(values_N: npt.NDArray[np.generic]) -> tuple[IntArray, IntArray, IntArray]:
    """Return the sorting order (N,), where each of G different values begins in it (G,), and codes (N,)."""
    _, code, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return np.argsort(code, kind="stable"), np.cumsum(counts) - counts, code


def _centred_ranks(weight_RN: FloatArray, side: tuple[IntArray, IntArray, IntArray]) -> tuple[FloatArray, FloatArray]:
    """Return average ranks minus their mean (R, N), and their sum of squares (R,), of the weighted rows.

    A value drawn t times in a resample of n rows has the mean rank (sum of smaller ones) + t/2 around n/2;
    the sum of squares is (n^3 - sum t^3) / 12 (Kendall 1970, tied ranks).
    """
    order, first, code = side
    times_RG = np.add.reduceat(weight_RN[:, order], first, axis=1)
    below_RG = np.cumsum(times_RG, axis=1)
    total_R = below_RG[:, -1].copy()
    squares_R = (total_R**3 - (times_RG * times_RG * times_RG).sum(axis=1)) / 12
    below_RG -= times_RG / 2 + total_R[:, None] / 2
    return below_RG[:, code], squares_R


def _correlation(
    weight_RN: FloatArray, x: tuple[FloatArray, FloatArray], y: tuple[FloatArray, FloatArray]
) -> FloatArray:
    squares_R = x[1] * y[1]
    product_R = np.einsum("rn,rn,rn->r", weight_RN, x[0], y[0])
    return np.where(squares_R > 0, product_R / np.sqrt(np.where(squares_R > 0, squares_R, 1)), math.nan)


# ---- How far a mean difference over repeats could have come out otherwise: the t-interval of paired differences


@dataclass(frozen=True, kw_only=True)
class MeanDifference:
    """Mean of K paired differences, their sample SD, the interval of the mean and a two-sided p-value."""

    mean: float
    sd: float
    lo: float
    hi: float
    p_value: float

    def to_json(self) -> dict[str, float | None]:
        """Return the figures by name, NaN as None."""
        return {name: json_number(value) for name, value in asdict(self).items()}


def mean_difference(
    differences_K: Sequence[float], *, test_to_train: float = 0.0, level: float = 0.95
) -> MeanDifference:
    """Judge the mean of K differences, one per repeat, by Student's t with K - 1 degrees of freedom.

    Repeats on random splits of the same rows share most of their training rows, so that their differences are not
    independent and the plain interval is too narrow. Nadeau and Bengio (Machine Learning 52, 2003) correct the variance
    of the mean to (1/K + n_test / n_train) * SD^2.

    Args:
        differences_K: one per repeat; NaN where there is none.
        test_to_train: n_test / n_train of a split; 0 for repeats that are independent given the data.
        level: share of the interval, in (0, 1).

    Returns:
        The figures over the repeats that have a difference; without two of them no SD, interval or p-value.
    """
    from scipy.stats import t

    known = np.asarray(differences_K, dtype=np.float64)
    known = known[np.isfinite(known)]
    nan = math.nan
    if known.size < 2:
        mean = float(known[0]) if known.size else nan
        return MeanDifference(mean=mean, sd=nan, lo=nan, hi=nan, p_value=nan)
    mean, sd = float(known.mean()), float(known.std(ddof=1))
    error = sd * math.sqrt(1 / known.size + test_to_train)
    half = error * float(t.ppf((1 + level) / 2, known.size - 1))
    # Equal differences: certain, but for a difference of 0, of which nothing can be said.
    p_value = float(2 * t.sf(abs(mean) / error, known.size - 1)) if error > 0 else (1.0 if mean == 0 else 0.0)
    return MeanDifference(mean=mean, sd=sd, lo=mean - half, hi=mean + half, p_value=p_value)


def difference_over_splits(
    differences_K: Sequence[float], *, num_test_K: Sequence[int], num_train_K: Sequence[int]
) -> MeanDifference:
    """Judge the mean of K differences on random splits of the same rows; the one rule of `compare` and `ablate`.

    Rows with the label are counted: of the test side those that are compared, else those of training. That leaves out
    validation rows, which errs towards a wide interval.
    """
    share = float(np.mean(num_test_K)) / max(1.0, float(np.mean(num_train_K)))
    return mean_difference(differences_K, test_to_train=share)


# ---- A difference between two that were trained and judged on the same rows, once or several times


Over = Literal["rows", "splits", "weights"]


class Trial(NamedTuple):
    """Predictions of two on N test rows, with labels (NaN where missing), groups, and the labelled training rows."""

    ours_N: npt.NDArray[np.floating]
    other_N: npt.NDArray[np.floating]
    label_N: npt.NDArray[np.floating]
    group_N: npt.ArrayLike
    num_train: int


def judged_difference(trials: Sequence[Trial], *, over: Over) -> tuple[list[float], PairedDifference | MeanDifference]:
    """Return the difference in SROCC of each trial, ours minus the other's, and how far it could have been another.

    Over 'rows': the paired bootstrap over groups of the rows, which all trials have, of their mean difference. Over
    'splits' of the same rows: the corrected t of `difference_over_splits`. Over 'weights' on one split, which do not
    make each other's training: the plain t.
    """
    values = [srocc(one.ours_N, one.label_N) - srocc(one.other_N, one.label_N) for one in trials]
    if over == "rows":
        first, pairs = trials[0], [(one.ours_N, one.other_N) for one in trials]
        return values, _mean_paired_difference(pairs, first.label_N, groups=first.group_N, seed=0)
    if over == "weights":
        return values, mean_difference(values)
    num_test = [int((~np.isnan(one.label_N)).sum()) for one in trials]
    return values, difference_over_splits(values, num_test_K=num_test, num_train_K=[one.num_train for one in trials])
