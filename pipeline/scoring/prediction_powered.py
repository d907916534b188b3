"""What people would say on average of rows that all have scores and some have labels: prediction-powered inference.

The scorer may be wrong in any way: labels correct its mean, and the interval is as wide as the correction is unsure. It
holds where the rows with labels are a random part of all. Must not know pictures, heads, runs or files.

With m the mean score of all rows, and m_L, y_L the means of score and label over the rows with labels, the estimate is

    y_L + lambda (m - m_L)

(Angelopoulos, Bates, Fannjiang, Jordan and Zrnic, Science 382, 2023), and lambda makes its variance least (PPI++,
Angelopoulos, Duchi and Zrnic, arXiv:2311.01453, 2023). There m is over the rows without labels; over all rows lambda is
theirs times (n + N) / N, and at the optimum the slope of labels on scores.

Rows of one prompt are not independent, so variances are sums over units (prompts, or pictures without one). Each unit
counts once, a row 1 / (rows of its unit). Shapes: N rows, U units, K generators.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.pipeline.scoring.agreement import json_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from deltaclip.pipeline.scoring.agreement import FloatArray, IntArray

    BoolArray = npt.NDArray[np.bool_]


MIN_UNITS = 10  # with labels: fewer say too little of how far labels and scores lie apart
ODD = 3.0  # standard errors between scores of rated and of all rows that a random choice makes once in 400 times


class Rated(NamedTuple):
    """N rows of one generator: finite scores, labels that are NaN where nobody rated, and units as codes below U."""

    score_N: FloatArray
    label_N: FloatArray
    unit_N: IntArray

    def of(self, chosen_N: BoolArray) -> Rated:
        """Return some of the rows."""
        return Rated(self.score_N[chosen_N], self.label_N[chosen_N], self.unit_N[chosen_N])


@dataclass(frozen=True, kw_only=True)
class HumanMean:
    """A mean of labels (or a difference of two): prediction-powered in `value`, `lo`, `hi`; of labels alone `alone...`.

    `p_value` is that of the value against 0.

    `labels` are the rows with one, `saved` how many more of them labels alone would need for an interval as narrow,
    `power` is lambda of each generator. `oddness`: by how many standard errors the scores of the rated rows differ from
    those of all.
    """

    value: float
    lo: float
    hi: float
    p_value: float
    alone: float
    alone_lo: float
    alone_hi: float
    labels: int
    units: int
    saved: float
    power: tuple[float, ...]
    oddness: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name, NaN as None."""
        plain = {name: json_number(v) if isinstance(v, float) else v for name, v in asdict(self).items()}
        return {**plain, "power": list(self.power)}


class _Side(NamedTuple):
    """A generator as sums over units: `alone` + lambda `gap` is its estimate, with the influence a + lambda b (U,)."""

    alone: float
    gap: float
    a_U: FloatArray
    b_U: FloatArray
    labels: int
    units: int


def human_mean(rows: Rated, num_units: int, *, level: float = 0.95) -> HumanMean | None:
    """Return the mean label that all rows would have; None where fewer than MIN_UNITS units have a label."""
    return _combined([_side(rows, num_units)], [1.0], level=level)


def human_difference(a: Rated, b: Rated, num_units: int, *, level: float = 0.95) -> HumanMean | None:
    """Return the mean label of `a` minus that of `b`, over the units that both have; with fewer than two, over all.

    Both may be rated on the same units or on others: what they share is in the variance. None as in `human_mean`.
    """
    there = [np.bincount(each.unit_N, minlength=num_units) > 0 for each in (a, b)]
    common_U = there[0] & there[1]
    if common_U.sum() > 1:
        a, b = a.of(common_U[a.unit_N]), b.of(common_U[b.unit_N])
    return _combined([_side(a, num_units), _side(b, num_units)], [1.0, -1.0], level=level)


def _side(rows: Rated, num_units: int) -> _Side:
    count_U = np.bincount(rows.unit_N, minlength=num_units)
    weight_N, rated_N = 1 / count_U[rows.unit_N], np.isfinite(rows.label_N)
    own_N, unit_L = weight_N[rated_N], rows.unit_N[rated_N]
    if not rated_N.any():
        nothing = np.zeros(num_units)
        return _Side(math.nan, math.nan, nothing, nothing, 0, 0)
    score_L, label_L = rows.score_N[rated_N], rows.label_N[rated_N]
    mean, mean_L, label = (
        float(np.average(values, weights=weights))
        for values, weights in ((rows.score_N, weight_N), (score_L, own_N), (label_L, own_N))
    )

    def influence(values: FloatArray, center: float, weights: FloatArray, units: IntArray) -> FloatArray:
        sum_U = np.bincount(units, weights=weights * (values - center), minlength=num_units)
        return np.asarray(sum_U / weights.sum())

    return _Side(
        alone=label,
        gap=mean - mean_L,
        a_U=influence(label_L, label, own_N, unit_L),
        b_U=influence(rows.score_N, mean, weight_N, rows.unit_N) - influence(score_L, mean_L, own_N, unit_L),
        labels=int(rated_N.sum()),
        units=len(np.unique(unit_L)),
    )


def _combined(sides: Sequence[_Side], signs: Sequence[float], *, level: float) -> HumanMean | None:
    """Return the signed sum of the sides, each with the lambda that makes the variance of the sum least.

    Small samples: lambda is clipped to [0, 1] and fitted to the same labels that it is used on (not cross-fitted),
    which costs a degree of freedom each, as a slope of a regression does: the variance is sum / (u - 1 - K) * u, and
    quantiles are Student's with u - 1 - K degrees of freedom, u the units with labels of the side that has fewer.
    """
    units = min(side.units for side in sides)
    if units < MIN_UNITS:
        return None
    a_U = np.sum([sign * side.a_U for sign, side in zip(signs, sides, strict=True)], axis=0)
    b_UK = np.stack([sign * side.b_U for sign, side in zip(signs, sides, strict=True)], axis=1)
    power_K = _least(a_U, b_UK)
    fitted = int(np.any(b_UK, axis=0).sum())  # none where every row has a label
    alone = sum(sign * side.alone for sign, side in zip(signs, sides, strict=True))
    shift = sum(sign * float(power) * side.gap for sign, power, side in zip(signs, power_K, sides, strict=True))
    error = math.sqrt(float(((a_U + b_UK @ power_K) ** 2).sum()) * units / (units - 1 - fitted))
    error_alone = math.sqrt(float((a_U**2).sum()) * units / (units - 1))
    half, half_alone = error * _quantile(level, units - 1 - fitted), error_alone * _quantile(level, units - 1)
    labels = sum(side.labels for side in sides)
    value = alone + shift
    return HumanMean(
        value=value,
        lo=value - half,
        hi=value + half,
        p_value=_p_value(value, error, units - 1 - fitted),
        alone=alone,
        alone_lo=alone - half_alone,
        alone_hi=alone + half_alone,
        labels=labels,
        units=units,
        saved=labels * ((half_alone / half) ** 2 - 1) if half > 0 else 0.0,
        power=tuple(float(power) for power in power_K),
        oddness=max(_oddness(side) for side in sides),
    )


def _least(a_U: FloatArray, b_UK: FloatArray) -> FloatArray:
    """Return the lambda in [0, 1] of each side that make the sum of (a + b lambda)^2 least, (K,)."""
    from scipy.optimize import lsq_linear

    scale = float(np.abs(b_UK).max())
    if scale < 1e-12:  # every row has a label, or all have one score: nothing to correct by
        return np.zeros(b_UK.shape[1])
    # The scale of scores is that of labels; divided by it so that tolerances of the solver are relative.
    found = lsq_linear(b_UK / scale, -a_U / scale, bounds=(0, 1), method="bvls")
    return np.asarray(found.x, dtype=np.float64)


def _oddness(side: _Side) -> float:
    error = math.sqrt(float((side.b_U**2).sum()))
    return abs(side.gap) / error if error > 1e-12 else 0.0


def _quantile(level: float, degrees: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, degrees))


def _p_value(value: float, error: float, degrees: int) -> float:
    from scipy.stats import t

    return float(2 * t.sf(abs(value) / error, degrees)) if error > 0 else float(value == 0)
