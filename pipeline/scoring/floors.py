"""What a score is worth: predictors that never look at an image, or look without having learned.

The no-image floor is the best of what source and prompt alone can say. Whether the words of a prompt say more than the
mean of its source is chosen on training rows, by leaving out what the test rows lack: whole groups where theirs are
new, single rows where they were seen. Knows labels, groups, sources and texts as plain arrays. Must not know heads,
files or splits.

Shapes: N rows, M test rows, R rows of a fit, K texts, F columns of the ridge.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.pipeline.scoring.agreement import Agreement, agreement, json_number, undefined
from deltaclip.pipeline.scoring.groups import group_keys, mix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy.typing as npt
    from scipy.sparse import csr_array

    from deltaclip.pipeline.scoring.agreement import FloatArray, IntArray
    from deltaclip.pipeline.scoring.groups import KeyArray

    Fixed = Callable[[IntArray], FloatArray]  # rows (R,) to the fixed part of their predictions (R,)

# A term of one prompt alone says nothing of another. More columns cost the cube of their number, and the 250 prompts of
# AGIQA-3K have 270 such terms.
MIN_PROMPTS, MAX_TERMS, MAX_SOURCES = 2, 600, 200
# From terms that count after a few rows to such that hardly count. A source counts after one: shrinking it as much as
# the words cost .015 SROCC of quality on AGIQA-3K.
STRENGTHS = (10.0, 30.0, 100.0, 300.0, 1000.0)
SOURCE_STRENGTH, LENGTH_SHARE = 1.0, 0.25
FOLDS = 5
MAX_ROWS = 20_000  # that words are weighed on: they determine 800 columns well, and more would take seconds
# In scripts without spaces a character is a word.
SPACELESS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(f"[{SPACELESS}]|[^\\W{SPACELESS}]+")


class Prompts(NamedTuple):
    """Texts of N rows: codes (N,) into K texts, -1 without one, and what gives the texts of some codes."""

    code_N: npt.NDArray[np.integer[Any]]
    read: Callable[[IntArray], Iterable[str]]


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Predictions (M,) for the test rows, NaN without any labelled training row, and how far they agree.

    `shrinkage` is the k of n / (n + k); infinite where the group explains nothing. `means` says what they rest on.
    """

    predicted: FloatArray
    agreement: Agreement
    shrinkage: float
    means: str = ""

    def to_json(self) -> dict[str, float | int | str | None]:
        """Return the agreement's figures, the shrinkage and what was predicted from."""
        return self.agreement.to_json() | {"shrinkage": json_number(self.shrinkage), "means": self.means}


def cosine_floor(cosine_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Agreement:
    """Score the raw cosine of image and prompt (N,) as a prediction: what CLIP knows without training."""
    return agreement(cosine_N, label_N)


def no_image_floor(
    label_N: npt.ArrayLike,
    *,
    groups: npt.ArrayLike,
    train: IntArray,
    test: IntArray,
    sources: npt.ArrayLike | None = None,
    prompts: Prompts | None = None,
    shrinkage: float | None = None,
) -> Floor:
    """Predict from source and prompt alone, fitted and chosen on training rows only.

    prediction = fixed part + n / (n + k) * mean residual of the group over its n training rows (the best linear
    predictor of a random effect, Henderson 1975). The fixed part is the mean of the source, or a ridge on source, words
    and length of the prompt: what has the smaller squared error on training rows left out. A source without training
    rows has the overall mean, a group without them the effect 0.

    Args:
        label_N: (N,) labels; NaN marks a missing one.
        groups: (N,) strings or integers, the prompt of each row.
        train: row indices to fit on.
        test: row indices to predict and judge.
        sources: (N,) strings or integers, the generator of each row, where known.
        prompts: texts of the rows; without them the fixed part is the mean of the source.
        shrinkage: k of at least 0; by default the ratio of residual to group variance, see `estimate_k`.
    """
    label = np.asarray(label_N, dtype=np.float64)
    train, test = np.asarray(train), np.asarray(test)
    rows = train[~np.isnan(label[train])]
    if rows.size == 0:
        missing = np.full(len(test), math.nan)
        note = "no training row has this label"
        return Floor(predicted=missing, agreement=undefined(n=0, note=note), shrinkage=math.inf)
    key_N = group_keys(groups)
    source_N = None if sources is None else np.unique(group_keys(sources, name="sources"), return_inverse=True)[1]
    known = _Known(label, np.unique(key_N, return_inverse=True)[1], source_N, shrinkage)
    is_seen = np.isin(known.group_N[test], known.group_N[rows])
    fixed, words = _fit_means(known, rows), False
    if prompts is not None:
        # Most of the test rows decide what is left out: where their prompts are known, so are those of the rows judged.
        design = _Design(known, prompts, _some(rows))
        fold_R = _folds(key_N[design.rows], by_group=bool(2 * is_seen.sum() <= test.size))
        strength = _strength(known, design, fold_R)
        words = strength is not None
        fixed = design.fit(strength) if strength is not None else fixed
        # Without a known group among the test rows only k is wanted: some rows tell enough of it.
        rows = rows if is_seen.any() else design.rows
    by_group, k = _effects(known, rows, fixed(rows))
    predicted = fixed(test) + by_group[known.group_N[test]]
    return Floor(
        predicted=predicted,
        agreement=agreement(predicted, label[test]),
        shrinkage=k,
        means=_means_words(has_source=sources is not None, words=words, has_group=bool(is_seen.any())),
    )


def _means_words(*, has_source: bool, words: bool, has_group: bool) -> str:
    """Say what a floor predicts from."""
    if words:
        fixed = f"ridge on {'source and ' if has_source else ''}prompt words"
    else:
        fixed = "mean of the source" if has_source else "overall mean"
    return fixed + (" + mean of the prompt" if has_group else "")


# ---- Means: of sources, and of groups as shrunk effects


class _Known(NamedTuple):
    """What is known of N rows: labels, codes of groups and sources, and k where it is given."""

    label_N: FloatArray
    group_N: IntArray
    source_N: IntArray | None
    k: float | None


def _fit_means(known: _Known, rows: IntArray) -> Fixed:
    """Return the mean of each row's source, where it has training rows, else of all."""
    label_R = known.label_N[rows]
    mean, source_N = label_R.mean(), known.source_N
    if source_N is None:
        return lambda chosen: np.full(len(chosen), mean)
    by_source = mean + _means(label_R - mean, source_N[rows], length=int(source_N.max()) + 1)
    return lambda chosen: by_source[source_N[chosen]]


def _effects(known: _Known, rows: IntArray, fixed_R: FloatArray) -> tuple[FloatArray, float]:
    """Return the shrunk effect of each group (G,), 0 of one without rows, and the k it was shrunk by."""
    residual_R, group_R = known.label_N[rows] - fixed_R, known.group_N[rows]
    k = estimate_k(residual_R, group_R) if known.k is None else known.k
    counts = np.bincount(group_R, minlength=int(known.group_N.max()) + 1)
    # n / (n + k) with k infinite is 0, and 0 for a group that was not seen, whatever k is.
    return counts / np.maximum(counts + k, 1) * _means(residual_R, group_R, length=counts.size), float(k)


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


# ---- Words: a ridge on source, terms and length of the prompt


class _Sums(NamedTuple):
    """Sums over rows of what a ridge needs: their number, x (F,), y, x x' (F, F) and x y (F,)."""

    size: float
    x_F: FloatArray
    y: float
    xx_FF: FloatArray
    xy_F: FloatArray

    @classmethod
    def of(cls, x_RF: csr_array, y_R: FloatArray) -> _Sums:
        """Return the sums over some rows."""
        return cls(y_R.size, x_RF.sum(axis=0), float(y_R.sum()), (x_RF.T @ x_RF).toarray(), x_RF.T @ y_R)

    def without(self, other: _Sums) -> _Sums:
        """Return the sums over the rows that are not among the others."""
        return _Sums(
            self.size - other.size,
            self.x_F - other.x_F,
            self.y - other.y,
            self.xx_FF - other.xx_FF,
            self.xy_F - other.xy_F,
        )


class _Design:
    """Columns of the ridge, as some rows have them: sources, terms of at least two prompts, length of the prompt."""

    def __init__(self, known: _Known, prompts: Prompts, rows: IntArray) -> None:
        self.rows, self._known, self._prompts = rows, known, prompts
        terms = self._terms(np.unique(prompts.code_N[rows]))
        counts = Counter(term for of_text in terms for term in of_text)
        common = [(term, count) for term, count in counts.items() if count >= MIN_PROMPTS]
        common.sort(key=lambda one: (-one[1], one[0]))  # as `most_common`, but the same whatever the order of rows
        self._place = {term: place for place, (term, _) in enumerate(common[:MAX_TERMS])}
        lengths = np.log1p([len(of_text) for of_text in terms])
        self._length, self._spread = float(lengths.mean()), float(lengths.std()) or 1.0
        self._sources = np.empty(0, dtype=np.int64)
        if known.source_N is not None:
            sources, num_rows = np.unique(known.source_N[rows], return_counts=True)
            self._sources = np.sort(sources[np.argsort(-num_rows, kind="stable")][:MAX_SOURCES])

    def _terms(self, code_K: IntArray) -> list[set[str]]:
        """Return words and neighbouring words of each text, none of code -1."""
        found = [WORD.findall(text.casefold()) for text in self._prompts.read(code_K[code_K >= 0])]
        terms = [{*words, *map(" ".join, pairwise(words))} for words in found]
        return [set[str]()] * int((code_K < 0).sum()) + terms  # codes rise: -1 is the first

    def matrix(self, rows: IntArray) -> csr_array:
        """Return the columns of some rows, (R, F)."""
        from scipy.sparse import csr_array, hstack

        code_K, text_R = np.unique(self._prompts.code_N[rows], return_inverse=True)
        terms = self._terms(code_K)
        places = [sorted(self._place[term] for term in of_text if term in self._place) for of_text in terms]
        ends = np.cumsum([0, *map(len, places)])
        flat = np.fromiter((place for each in places for place in each), dtype=np.int64, count=int(ends[-1]))
        words_KV = csr_array((np.ones(flat.size), flat, ends), shape=(len(terms), len(self._place)))
        length_K = (np.log1p([len(of_text) for of_text in terms]) - self._length) / self._spread
        parts = [words_KV[text_R], csr_array(length_K[text_R, None])]
        if self._known.source_N is not None:
            source_R = self._known.source_N[rows]
            column_R = np.searchsorted(self._sources, source_R)
            is_known = np.isin(source_R, self._sources)
            entries = (np.ones(int(is_known.sum())), (np.flatnonzero(is_known), column_R[is_known]))
            parts.append(csr_array(entries, shape=(len(rows), self._sources.size)))
        return hstack(parts, format="csr")

    def solve(self, sums: _Sums, strength: float) -> Callable[[csr_array], FloatArray]:
        """Return the ridge of some sums; its intercept is free."""
        from scipy.linalg import solve

        mean_F, mean = sums.x_F / sums.size, sums.y / sums.size
        square_FF = sums.xx_FF - sums.size * np.outer(mean_F, mean_F)
        weights = np.full(mean_F.size, SOURCE_STRENGTH)
        weights[: len(self._place)] = strength
        weights[len(self._place)] = strength * LENGTH_SHARE
        square_FF[np.diag_indices_from(square_FF)] += weights
        slope_F = solve(square_FF, sums.xy_F - sums.size * mean * mean_F, assume_a="pos")
        return lambda x_RF: x_RF @ slope_F + (mean - float(mean_F @ slope_F))

    def fit(self, strength: float) -> Fixed:
        """Return the ridge on all rows of the design."""
        ridge = self.solve(_Sums.of(self.matrix(self.rows), self._known.label_N[self.rows]), strength)
        return lambda chosen: self._predicted(ridge, chosen)

    def _predicted(self, ridge: Callable[[csr_array], FloatArray], rows: IntArray) -> FloatArray:
        """Return the ridge's prediction of each row, (R,); each pair of source and prompt is read once, in blocks."""
        pair_R = self._prompts.code_N[rows].astype(np.int64)
        if (source_N := self._known.source_N) is not None:
            pair_R = (pair_R + 1) * (int(source_N.max()) + 1) + source_N[rows]
        _, first_P, pair_R = np.unique(pair_R, return_index=True, return_inverse=True)
        blocks = [rows[first_P[start : start + MAX_ROWS]] for start in range(0, first_P.size, MAX_ROWS)]
        by_pair = np.concatenate([np.empty(0), *(ridge(self.matrix(block)) for block in blocks)])
        return np.asarray(by_pair[pair_R])


def _some(rows: IntArray) -> IntArray:
    """Return at most MAX_ROWS of the rows, drawn at random."""
    if rows.size <= MAX_ROWS:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, MAX_ROWS, replace=False))


def _folds(key_R: KeyArray, *, by_group: bool) -> IntArray:
    """Return the fold of each row (R,), at most FOLDS of them: whole groups, or single rows."""
    if not by_group:  # the rows of a group in turns
        order = np.argsort(mix(key_R, seed=0), kind="stable")
        fold_R = np.empty(key_R.size, dtype=np.int64)
        fold_R[order] = np.arange(key_R.size) % FOLDS
        return fold_R
    keys, code_R = np.unique(key_R, return_inverse=True)
    fold_G = np.empty(keys.size, dtype=np.int64)
    fold_G[np.argsort(mix(keys, seed=0))] = np.arange(keys.size) % FOLDS
    return fold_G[code_R]


def _strength(known: _Known, design: _Design, fold_R: IntArray) -> float | None:
    """Return the strength of the ridge that errs least on rows left out, None where the means err as little."""
    if fold_R.max() == 0:
        return None  # one group: nothing can be left out
    x_RF, label_R = design.matrix(design.rows), known.label_N[design.rows]
    parts = [_Sums.of(x_RF[fold_R == fold], label_R[fold_R == fold]) for fold in range(fold_R.max() + 1)]
    total = _Sums.of(x_RF, label_R)
    errors = dict.fromkeys((None, *STRENGTHS), 0.0)
    for fold, part in enumerate(parts):
        is_out, rest = fold_R == fold, total.without(part)
        kept, left_out = design.rows[~is_out], design.rows[is_out]
        means = _fit_means(known, kept)
        errors[None] += _error(known, (kept, means(kept)), (left_out, means(left_out)))
        for strength in STRENGTHS:
            ridge = design.solve(rest, strength)
            errors[strength] += _error(known, (kept, ridge(x_RF[~is_out])), (left_out, ridge(x_RF[is_out])))
    return min(errors, key=lambda strength: errors[strength])


def _error(known: _Known, kept: tuple[IntArray, FloatArray], left_out: tuple[IntArray, FloatArray]) -> float:
    """Return the squared error on rows left out, given rows and fixed part of both, with their groups' effects."""
    by_group, _ = _effects(known, *kept)
    rows, fixed_R = left_out
    return float(np.square(fixed_R + by_group[known.group_N[rows]] - known.label_N[rows]).sum())
