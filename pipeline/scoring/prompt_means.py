"""Means over prompts of several generators, and their differences prompt by prompt: bootstrap over prompts.

A unit is what is drawn as a whole: a prompt, or a picture without one. Each unit counts once, however many pictures it
has. Must not know pictures, heads, runs or files.

Shapes: N rows of a generator, U units of all of them together, K columns, R resamples.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.pipeline.scoring.agreement import json_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deltaclip.pipeline.scoring.agreement import FloatArray, IntArray


RESAMPLES, PER_PAIR = 10_000, 200  # so that the smallest p-value, some 3 / resamples, is below .05 after Holm
BLOCK = 2_000_000  # numbers drawn at a time: 16 MB
# Beyond, the mean of so many units is normal to more digits than are shown, and drawing them would take seconds.
MAX_UNITS = 20_000


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over units, its interval, the p-value against 0, and how many units it is over."""

    value: float
    lo: float
    hi: float
    p_value: float
    units: int

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name, NaN as None."""
        return {name: json_number(v) if isinstance(v, float) else v for name, v in asdict(self).items()}


class Difference(NamedTuple):
    """The mean of one generator minus another's: over `mean.units` common units where `is_paired`, else of each alone.

    `only` are the units that the one and the other have alone: left out of a paired difference.
    """

    mean: Mean
    is_paired: bool
    only: tuple[int, int]


def unit_means(value_N: FloatArray, unit_N: IntArray, num_units: int) -> FloatArray:
    """Return the mean of each unit's finite values, (U,) float64; NaN of one that has none."""
    known = np.isfinite(value_N)
    count_U = np.bincount(unit_N[known], minlength=num_units)
    sum_U = np.bincount(unit_N[known], weights=value_N[known], minlength=num_units)
    return np.where(count_U > 0, sum_U / np.maximum(count_U, 1), math.nan)


def ranked_means(
    mean_UG: FloatArray, *, level: float = 0.95, resamples: int | None = None, seed: int = 0
) -> tuple[list[Mean], dict[tuple[int, int], Difference]]:
    """Return the mean of each of G generators and the difference of each pair (first minus second).

    Units are drawn with replacement, the same draws for every generator. Two generators are compared on the units that
    both have; where those are fewer than two, each with its own.

    Args:
        mean_UG: (U, G) means of the units, NaN where a generator lacks one.
        level: share of the intervals, in (0, 1).
        resamples: at least 1; None takes enough for the number of pairs.
        seed: any integer of at least 0.

    The intervals are the bootstrap's percentiles, moved outwards as Student's t with units - 1 degrees of freedom is
    wider than the normal (the expanded percentiles of Hesterberg, The American Statistician 69, 2015): without that,
    20 units cover .93. The p-values are of the same intervals: the level at which one begins to hold 0.
    """
    is_there = np.isfinite(mean_UG)
    pairs = list(itertools.combinations(range(mean_UG.shape[1]), 2))
    paired = [pair for pair in pairs if is_there[:, pair].all(axis=1).sum() > 1]
    columns = np.stack([*mean_UG.T, *(mean_UG[:, a] - mean_UG[:, b] for a, b in paired)], axis=1)
    enough = max(RESAMPLES, PER_PAIR * len(pairs)) if resamples is None else resamples
    drawn_RK = _resampled(columns, resamples=enough, rng=np.random.default_rng(seed))
    units_K = np.isfinite(columns).sum(axis=0)
    points_K = [
        float(column[np.isfinite(column)].mean()) if n else math.nan
        for column, n in zip(columns.T, units_K, strict=True)
    ]
    own = {pair: place for place, pair in enumerate(paired, start=mean_UG.shape[1])}
    found = {}
    for a, b in pairs:
        common, alone = is_there[:, [a, b]].all(axis=1), tuple(int(units_K[each]) for each in (a, b))
        only = tuple(n - int(common.sum()) for n in alone)
        if (a, b) in own:
            at = own[a, b]
            mean = _judged(points_K[at], drawn_RK[:, at], int(units_K[at]), level=level)
        else:
            mean = _judged(points_K[a] - points_K[b], drawn_RK[:, a] - drawn_RK[:, b], min(alone), level=level)
        found[a, b] = Difference(mean, (a, b) in own, (only[0], only[1]))
    means = [_judged(points_K[g], drawn_RK[:, g], int(units_K[g]), level=level) for g in range(mean_UG.shape[1])]
    return means, found


def _judged(point: float, drawn_R: FloatArray, units: int, *, level: float) -> Mean:
    """Return a mean with its expanded percentiles, and the level at which they begin to hold 0 as p-value."""
    from scipy.stats import norm, t

    finite = np.sort(drawn_R[np.isfinite(drawn_R)])
    if units < 2 or not finite.size:
        return Mean(value=point, lo=math.nan, hi=math.nan, p_value=math.nan, units=units)
    wider = math.sqrt(units / (units - 1))
    tail = float(norm.cdf(wider * t.ppf((1 - level) / 2, units - 1)))
    lo, hi = np.quantile(finite, [tail, 1 - tail])
    # Counted with the sample itself (Davison and Hinkley 1997, section 4): never 0.
    smaller = (1 + min(int((finite <= 0).sum()), int((finite >= 0).sum()))) / (finite.size + 1)
    p_value = float(min(1.0, 2 * t.cdf(norm.ppf(min(smaller, 0.5)) / wider, units - 1)))
    return Mean(value=point, lo=float(lo), hi=float(hi), p_value=p_value, units=units)


def _resampled(value_UK: FloatArray, *, resamples: int, rng: np.random.Generator) -> FloatArray:
    """Return the mean of each column's finite values on every resample of units, (R, K); NaN where it drew none."""
    num_units, is_there = len(value_UK), np.isfinite(value_UK)
    if num_units > MAX_UNITS:
        units_K = is_there.sum(axis=0)
        error_K = np.nanstd(value_UK, axis=0) / np.sqrt(units_K)
        return np.asarray(np.nanmean(value_UK, axis=0) + error_K * rng.standard_normal((resamples, len(units_K))))
    filled_UK, present_UK = np.where(is_there, value_UK, 0.0), is_there.astype(np.float64)
    blocks = []
    for times_BU in _draws(num_units, resamples, rng):
        count_BK = times_BU @ present_UK
        blocks.append(np.where(count_BK > 0, times_BU @ filled_UK / np.maximum(count_BK, 1), math.nan))
    return np.concatenate(blocks)


def _draws(num_units: int, resamples: int, rng: np.random.Generator) -> Iterator[FloatArray]:
    """Yield how often each unit is drawn, (B, U), a block of resamples at a time."""
    step = max(1, BLOCK // num_units)
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        drawn = rng.integers(num_units, size=(rows, num_units)) + np.arange(rows)[:, None] * num_units
        yield np.bincount(drawn.ravel(), minlength=rows * num_units).reshape(rows, num_units).astype(np.float64)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm, Scandinavian Journal of Statistics 6, 1979); NaN stays NaN.

    All that are below a level then err together with at most that chance.
    """
    adjusted = [math.nan] * len(p_values)
    known = sorted((p, place) for place, p in enumerate(p_values) if math.isfinite(p))
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted
