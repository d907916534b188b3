"""What a score is worth: predictors that never look, or look without having learned.

Knows the no-image floor and the zero-shot cosine on plain arrays. Must not know heads or files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.pipeline.scoring.groups import group_keys
from deltaclip.pipeline.scoring.metrics import Agreement, agreement, json_number, undefined

if TYPE_CHECKING:
    import numpy.typing as npt

    from deltaclip.pipeline.scoring.ranks import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Predictions (N,) for the test rows, NaN without any labelled training row, and how far they agree.

    `shrinkage` is the k of n / (n + k); infinite where the prompt explains nothing.
    """

    predicted: FloatArray
    agreement: Agreement
    shrinkage: float

    def to_json(self) -> dict[str, float | int | str | None]:
        """Return the agreement's figures and the shrinkage."""
        return self.agreement.to_json() | {"shrinkage": json_number(self.shrinkage)}


def no_image_floor(
    label_N: npt.ArrayLike,
    *,
    groups: npt.ArrayLike,
    train: IntArray,
    test: IntArray,
    sources: npt.ArrayLike | None = None,
    shrinkage: float | None = None,
) -> Floor:
    """Predict from source and prompt alone: source mean + shrunk prompt mean, fitted on training rows only.

    prediction = mean of the source + n / (n + k) * mean residual of the prompt over its n training rows
    (the best linear predictor of a random effect, Henderson 1975). A source without training rows has the
    overall mean, a prompt without them the effect 0: on a clean split the source mean is all there is.

    Args:
        label_N: (N,) labels; NaN marks a missing one.
        groups: (N,) strings or integers, the prompt of each row.
        train: row indices to fit on.
        test: row indices to predict and judge.
        sources: (N,) strings or integers, the generator of each row, where known.
        shrinkage: k of at least 0; by default the ratio of residual to prompt variance, see `estimate_k`.
    """
    label = np.asarray(label_N, dtype=np.float64)
    rows = np.asarray(train)[~np.isnan(label[train])]
    if rows.size == 0:
        missing = np.full(len(test), math.nan)
        note = "no training row has this label"
        return Floor(predicted=missing, agreement=undefined(n=0, note=note), shrinkage=math.inf)
    _, prompt = np.unique(group_keys(groups), return_inverse=True)
    one_source = np.zeros(label.size, dtype=np.int64)
    _, source = np.unique(group_keys(one_source if sources is None else sources, name="sources"), return_inverse=True)
    mean = label[rows].mean()
    by_source = mean + _means(label[rows] - mean, source[rows], length=source.max() + 1)
    residual = label[rows] - by_source[source[rows]]
    k = estimate_k(residual, prompt[rows]) if shrinkage is None else shrinkage
    counts = np.bincount(prompt[rows], minlength=prompt.max() + 1)
    # n / (n + k) with k infinite is 0, and 0 for a prompt that was not seen, whatever k is.
    weight = counts / np.maximum(counts + k, 1)
    by_prompt = weight * _means(residual, prompt[rows], length=counts.size)
    predicted = by_source[source[test]] + by_prompt[prompt[test]]
    return Floor(predicted=predicted, agreement=agreement(predicted, label[test]), shrinkage=float(k))


def cosine_floor(cosine_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Agreement:
    """Score the raw cosine of image and prompt (N,) as a prediction: what CLIP knows without training."""
    return agreement(cosine_N, label_N)


def estimate_k(residual_N: FloatArray, code_N: IntArray) -> float:
    """Return k = variance within groups / variance of group effects, infinite where groups explain nothing.

    One-way random effects by the method of moments for unequal group sizes (Searle, Casella and McCulloch,
    Variance Components, 1992): s2 = MSW, s2_group = (MSB - MSW) / n0,
    n0 = (N - sum n_g^2 / N) / (G - 1).
    """
    counts = np.bincount(code_N)
    counts = counts[counts > 0]
    num_rows, num_groups = residual_N.size, counts.size
    if num_groups < 2 or num_rows == num_groups:
        return math.inf
    mean_N = _means(residual_N, code_N, length=int(code_N.max()) + 1)[code_N]
    within = float(((residual_N - mean_N) ** 2).sum()) / (num_rows - num_groups)
    between = float(((mean_N - residual_N.mean()) ** 2).sum()) / (num_groups - 1)
    size = (num_rows - float((counts.astype(np.float64) ** 2).sum()) / num_rows) / (num_groups - 1)
    return within * size / (between - within) if between > within else math.inf


def _means(value_N: FloatArray, code_N: IntArray, *, length: int) -> FloatArray:
    """Return the mean value of each code (length,), 0 for a code without rows."""
    sums = np.bincount(code_N, weights=value_N, minlength=length)
    means: FloatArray = sums / np.maximum(np.bincount(code_N, minlength=length), 1)
    return means
