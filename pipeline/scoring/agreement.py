"""How well predictions agree with people: the field's figures, each defined for every input.

SROCC, KROCC, PLCC (raw and mapped) and RMSE of two arrays, also per source. Ranks are of numpy alone: scipy.stats costs
0.7 s on top of the 0.8 s of scipy.optimize, and a training scores every epoch. Must not know heads, files or splits.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deltaclip.pipeline.scoring.groups import known_groups

if TYPE_CHECKING:
    import numpy.typing as npt


# ---- How well predictions agree with people: the field's figures, each defined for every input


__all__ = ["Agreement", "agreement", "agreement_by", "json_number", "krocc", "pearson", "srocc"]

# A correlation of two rows is always -1 or 1 and says nothing.
MIN_ROWS = 3
# The logistic has 4 parameters: it goes through any 4 rows, so that its error would be 0 by construction.
MIN_ROWS_MAPPED = 5
# The grid of starts of the logistic, in SDs of the predictions: widths from a step to a line, places among the rows and
# beyond them; how many are tried for a few steps, and how many of these are followed to the end.
GRID_WIDTHS = (0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6, 5.0)
GRID_OUTSIDE = np.array([0.5, 1.5, 4.0])
GRID_PLACES, GRID_ROWS, GRID_STARTS = 40, 1000, 8
TRIED_STEPS, FOLLOWED, FOLLOWED_STEPS = 40, 3, 500
USUAL_START = (0.0, math.log(0.25))
# A step is the steepest logistic there is, a line the flattest; the longest move of a place, in widths or SDs, and of a
# log of a width; a gain, as a share of the error, that does not show; the damping at which no gain is the end.
LOG_WIDTHS = (math.log(1e-9), math.log(1e4))
MOST_MOVE, LEAST_GAIN, MOST_DAMPING = 2.0, 1e-10, 1e10
TINY, LEAST_SPREAD = 1e-60, 1e-30
_SHAPES = ((-1, 1), (-1,), (-1,), (-1, 1), (1, -1, 1), (-1,))  # of a mask (S,) beside each field of `_Curves`


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of predictions with labels over `n` labelled rows; a figure that does not exist is NaN.

    `main` is the mean of SROCC and raw PLCC: raw, so that it rests on no fit that may fail or flatter.
    `note` says in words why a figure is missing or was not mapped, and is empty otherwise.
    """

    srocc: float
    krocc: float
    plcc: float
    plcc_mapped: float
    rmse: float
    main: float
    n: int
    note: str = ""

    def to_json(self) -> dict[str, float | int | str | None]:
        """Return the figures by name, NaN as None."""
        return {name: json_number(v) if isinstance(v, float) else v for name, v in asdict(self).items()}


def agreement(predicted_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Agreement:
    """Score predictions against labels with every figure of the field.

    Args:
        predicted_N: (N,) predictions, any real dtype; finite in rows with a label.
        label_N: (N,) labels; NaN marks a missing one, its row is left out.

    Returns:
        The figures: SROCC and KROCC (tau-b) on raw predictions, PLCC raw and after the 4-parameter logistic
        of `fit_logistic`, RMSE = sqrt(mean((f(x) - y)^2)) after it. Where no logistic can be fitted, f(x) = x
        and `note` says so. Fewer than 3 labelled rows: all NaN. A constant side: NaN but for the RMSE.

    Raises:
        ValueError: see `labelled_rows`.
    """
    mask = labelled_rows(predicted_N, label_N)
    x = np.asarray(predicted_N, dtype=np.float64)[mask]
    y = np.asarray(label_N, dtype=np.float64)[mask]
    if x.size < MIN_ROWS:
        return undefined(n=x.size, note=f"{x.size} labelled rows, {MIN_ROWS} are needed")
    mapped, note = _mapped(x, y)
    rank, linear = srocc(x, y), pearson(x, y)
    return Agreement(
        srocc=rank,
        krocc=krocc(x, y),
        plcc=linear,
        plcc_mapped=pearson(mapped, y),
        rmse=math.sqrt(float(np.mean((mapped - y) ** 2))),
        main=(rank + linear) / 2,
        n=x.size,
        note=note,
    )


def agreement_by(
    predicted_N: npt.ArrayLike, label_N: npt.ArrayLike, *, groups_N: npt.ArrayLike
) -> dict[str, Agreement]:
    """Score every group (a source, say) on its own; groups (N,) hold strings or integers."""
    names, code_N = np.unique(known_groups(groups_N), return_inverse=True)
    predicted, label = np.asarray(predicted_N), np.asarray(label_N)
    if predicted.shape != code_N.shape or label.shape != code_N.shape:
        message = f"predictions {predicted.shape}, labels {label.shape} and groups {code_N.shape} differ in length"
        raise ValueError(message)
    rows_by_name = np.split(np.argsort(code_N, kind="stable"), np.cumsum(np.bincount(code_N))[:-1])
    pairs = zip(names.tolist(), rows_by_name, strict=True) if names.size else ()
    return {str(name): agreement(predicted[rows], label[rows]) for name, rows in pairs}


def undefined(*, n: int, note: str) -> Agreement:
    """Return an agreement without a single figure, with the reason."""
    nan = math.nan
    return Agreement(srocc=nan, krocc=nan, plcc=nan, plcc_mapped=nan, rmse=nan, main=nan, n=n, note=note)


def _mapped(x_N: FloatArray, y_N: FloatArray) -> tuple[FloatArray, str]:
    """Return f(x) and an empty note, or x itself and the reason why there is no f."""
    for name, values in (("predictions", x_N), ("labels", y_N)):
        if values.min() == values.max():
            return x_N, f"constant {name}: no correlation, not mapped"
    if x_N.size < MIN_ROWS_MAPPED:
        return x_N, f"{x_N.size} rows, too few for the logistic: not mapped"
    mapped = fit_logistic(x_N, y_N)
    if mapped is None:
        return x_N, "the logistic did not converge: not mapped"
    return mapped, ""


def fit_logistic(x_N: FloatArray, y_N: FloatArray) -> FloatArray | None:
    """Fit the field's 4-parameter logistic to labels by least squares and apply it to the predictions.

    f(x) = (b1 - b2) / (1 + exp(-(x - b3) / |b4|)) + b2 (VQEG 2000, in the form of Seshadrinathan et al., IEEE TIP
    19(6), 2010), rising where SROCC is positive or 0, else falling: a curve against the order of the data would call a
    bad score good. The usual start [max y, min y, mean x, std x / 4] alone ends in a local minimum for some 20 rows; a
    grid of b3, |b4| gives further ones. Of what converged, from all of them, the least error.

    Equal numbers give equal digits, wherever they lie in memory; MINPACK's fits did not, a run and its evaluation
    differed in the tenth digit.

    Returns:
        f(x) (N,), or None where no fit converges, or none but to a constant.
    """
    # In units of their own spread around their own mean both may have any scale and offset; f is the same function.
    middle, size = float(y_N.mean()), float(np.abs(y_N - y_N.mean()).max())
    z_N, y_N = centred(x_N), centred(y_N)
    z_N = z_N / z_N.std()
    sign = -1.0 if srocc(x_N, y_N) < 0 else 1.0
    start_S2 = np.array([USUAL_START, *_grid_starts(z_N, y_N, sign=sign)])
    tried = _followed(start_S2, z_N, y_N, sign=sign, steps=TRIED_STEPS)
    best = [place for place in np.argsort(tried.error_S, kind="stable") if sign * tried.step_S[place] > 0]
    if not best:
        return None
    ends = _followed(tried.at_S2[best[:FOLLOWED]], z_N, y_N, sign=sign, steps=FOLLOWED_STEPS)
    error_S = np.where(ends.converged_S & (sign * ends.step_S > 0), ends.error_S, np.inf)
    chosen = int(np.argmin(error_S))
    mapped = middle + size * ends.curve_SN[chosen]
    return mapped if math.isfinite(error_S[chosen]) and mapped.min() < mapped.max() else None


class _Curves(NamedTuple):
    """Logistics of S places and logs of widths, b1 - b2 and b2 those of least squares; the error is squared.

    `way_2SN` is how the curve moves with both, b1 - b2 and b2 following (Kaufman 1975, of variable projection: Golub
    and Pereyra 1973).
    """

    at_S2: FloatArray
    step_S: FloatArray
    error_S: FloatArray
    curve_SN: FloatArray
    way_2SN: FloatArray
    converged_S: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, at_S2: FloatArray, z_N: FloatArray, y_N: FloatArray) -> _Curves:
        from scipy.special import expit

        width_S1 = np.exp(at_S2[:, 1:])
        u_SN = (z_N - at_S2[:, :1]) / width_S1
        g_SN = expit(u_SN)
        rise_SN = g_SN * (1 - g_SN)
        g_SN = g_SN - g_SN.mean(axis=1, keepdims=True)
        spread_S1 = np.maximum(np.square(g_SN).sum(axis=1, keepdims=True), LEAST_SPREAD)
        step_S1 = (g_SN * (y_N - y_N.mean())).sum(axis=1, keepdims=True) / spread_S1
        curve_SN = y_N.mean() + step_S1 * g_SN
        way_2SN = np.stack([rise_SN / width_S1, rise_SN * u_SN]) * -step_S1
        way_2SN -= way_2SN.mean(axis=2, keepdims=True)
        way_2SN -= g_SN * ((way_2SN * g_SN).sum(axis=2, keepdims=True) / spread_S1)
        error_S = np.square(curve_SN - y_N).sum(axis=1)
        return cls(at_S2, step_S1[:, 0], error_S, curve_SN, way_2SN, np.zeros(len(at_S2), dtype=bool))


def _followed(start_S2: FloatArray, z_N: FloatArray, y_N: FloatArray, *, sign: float, steps: int) -> _Curves:
    """Return where starts lead to in at most so many steps of Levenberg and Marquardt, each by itself.

    Curves that fall where `sign` says that they should rise are not gone to. Sums over rows alone, in one order, and
    two equations solved by hand: no library whose result hangs on where in memory its numbers lie.
    """
    here, damping_S = _Curves.of(start_S2, z_N, y_N), np.full(len(start_S2), 1e-3)
    for _ in range(steps):
        across_S, down_S = np.square(here.way_2SN).sum(axis=2) * (1 + damping_S) + TINY
        both_S = (here.way_2SN[0] * here.way_2SN[1]).sum(axis=1)
        to_place_S, to_width_S = (here.way_2SN * (y_N - here.curve_SN)).sum(axis=2)
        determinant_S = np.maximum(across_S * down_S - both_S**2, TINY**2)
        move_S2 = np.stack([to_place_S * down_S - to_width_S * both_S, to_width_S * across_S - to_place_S * both_S], 1)
        most_S2 = np.stack([np.maximum(np.exp(here.at_S2[:, 1]), 1.0), np.ones(len(damping_S))], axis=1) * MOST_MOVE
        at_S2 = here.at_S2 + np.clip(move_S2 / determinant_S[:, None], -most_S2, most_S2)
        at_S2[:, 1] = np.clip(at_S2[:, 1], *LOG_WIDTHS)
        there = _Curves.of(at_S2, z_N, y_N)
        gain_S = here.error_S - there.error_S
        better_S = (gain_S > 0) & (sign * there.step_S > 0)
        # Done: what a step gains cannot be seen, or no step however short gains.
        ends_S = (better_S & (gain_S <= LEAST_GAIN * here.error_S)) | (~better_S & (damping_S >= MOST_DAMPING))
        here = _Curves(
            *(np.where(better_S.reshape(shape), new, old) for new, old, shape in zip(there, here, _SHAPES, strict=True))
        )._replace(converged_S=here.converged_S | ends_S)
        damping_S = np.clip(np.where(better_S, damping_S / 8, damping_S * 8), 1 / MOST_DAMPING, MOST_DAMPING)
        if here.converged_S.all():
            break
    return here


def _grid_starts(z_N: FloatArray, y_N: FloatArray, *, sign: float) -> list[tuple[float, float]]:
    """Return the best place for each of a few widths, with its log, those of least error first; of GRID_ROWS rows."""
    from scipy.special import expit

    if z_N.size > GRID_ROWS:
        order = np.argsort(z_N, kind="stable")[np.linspace(0, z_N.size - 1, GRID_ROWS).astype(np.int64)]
        z_N, y_N = z_N[order], y_N[order]
    places = np.unique(np.quantile(z_N, np.linspace(0, 1, min(z_N.size, GRID_PLACES))))
    # At a row, where a steep curve still has a slope, between two, and outside, where it bends one way.
    places = np.concatenate(
        [places, (places[1:] + places[:-1]) / 2, places[0] - GRID_OUTSIDE, places[-1] + GRID_OUTSIDE]
    )
    y_N = y_N - y_N.mean()
    starts = []
    for width in GRID_WIDTHS:
        g_PN = expit((z_N - places[:, None]) / width)
        g_PN -= g_PN.mean(axis=1)[:, None]
        spread_P, product_P = np.square(g_PN).sum(axis=1), (g_PN * y_N).sum(axis=1)
        # Least squares in b1 - b2, where it has the right sign.
        gain_P = np.where(sign * product_P > 0, product_P**2 / np.maximum(spread_P, LEAST_SPREAD), 0.0)
        gain_P[spread_P < 1e-12] = 0.0
        best = int(np.argmax(gain_P))
        if gain_P[best] > 0:
            starts.append((float(gain_P[best]), (float(places[best]), math.log(width))))
    return [start for _, start in sorted(starts, key=lambda one: -one[0])[:GRID_STARTS]]


# ---- Ranks and rank correlations of plain arrays, in numpy alone


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
