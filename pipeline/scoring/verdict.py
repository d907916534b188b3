"""What a head is worth: its SROCC on test rows against its floor and the cosine, and how surely; of repeats the mean.

The interval is that of a paired bootstrap over groups; over repeats a t of differences. Where there is no floor to
compare with, SROCC is compared with 0, that of chance. Knows predictions and labels as arrays. Must not know heads or
words.

Shapes: M test rows, K repeats.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deltaclip.pipeline.scoring.agreement import json_number, srocc
from deltaclip.pipeline.scoring.intervals import difference_over_splits, paired_difference, srocc_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

# Bounds at 2.5 % are then known to a tenth of the interval's width (10 of 400 resamples lie beyond each), in 0.1 s.
RESAMPLES = 400

Outcome = Literal["clear", "unclear", "below", "unjudged"]


@dataclass(frozen=True, kw_only=True)
class Margin:
    """SROCC of a head minus that of another predictor, with its 95 % interval; NaN where it does not exist."""

    difference: float
    lo: float
    hi: float

    @property
    def outcome(self) -> Outcome:
        """Tell whether the head is surely better, surely worse, or neither."""
        if not (math.isfinite(self.difference) and math.isfinite(self.lo) and math.isfinite(self.hi)):
            return "unjudged"
        return "clear" if self.lo > 0 else "below" if self.hi < 0 else "unclear"

    def to_json(self) -> dict[str, float | str | None]:
        """Return outcome and figures by name, NaN as None."""
        return {"outcome": self.outcome} | {name: json_number(value) for name, value in asdict(self).items()}


def margin(
    predicted_M: npt.ArrayLike, other_M: npt.ArrayLike | None, label_M: npt.ArrayLike, *, groups: npt.ArrayLike
) -> Margin:
    """Return how far a head is ahead of another predictor of the same rows, or of chance where `other_M` is None.

    Args:
        predicted_M: (M,) scores of the head.
        other_M: (M,) those of the other predictor; rows where it has none (NaN) are left out.
        label_M: (M,) labels, NaN where missing.
        groups: (M,) strings or integers: whole groups are drawn.
    """
    predicted, label = np.asarray(predicted_M), np.asarray(label_M, dtype=np.float64)
    if other_M is None:
        lo, hi = srocc_interval(predicted, label, seed=0, groups=groups)  # the very one that stands beside SROCC
        return Margin(difference=srocc(predicted, label), lo=lo, hi=hi)
    other = np.asarray(other_M)
    label = np.where(np.isfinite(other), label, math.nan)
    found = paired_difference(predicted, other, label, groups=groups, resamples=RESAMPLES, seed=0)
    return Margin(difference=found.difference, lo=found.lo, hi=found.hi)


def mean_margin(margins_K: Sequence[dict[str, Any] | None], sizes_K: Sequence[tuple[int, int]]) -> Margin:
    """Return the mean of the margins of K repeats as JSON has them; `sizes_K` are their labelled (test, train) rows."""
    nan = math.nan
    found = [nan if one is None or one["difference"] is None else one["difference"] for one in margins_K]
    mean = difference_over_splits(
        found, num_test_K=[test for test, _ in sizes_K], num_train_K=[train for _, train in sizes_K]
    )
    return Margin(difference=mean.mean, lo=mean.lo, hi=mean.hi)
