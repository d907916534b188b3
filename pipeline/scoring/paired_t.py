"""How far a mean difference over repeats could have come out otherwise: the t-interval of paired differences.

Knows one difference per repeat. Must not know runs, splits or files.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.pipeline.scoring.ranks import json_number

if TYPE_CHECKING:
    from collections.abc import Sequence


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
