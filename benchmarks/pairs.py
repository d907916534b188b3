"""What pairs that people chose between are worth beside ratings, on a cache that has ratings with their SDs.

`python -m benchmarks.pairs cache.h5` draws pairs within prompts: either image gets the score of one rater, its label
plus its SD times a normal number, and scores closer than .06 of the range are a tie. Bases are then fitted to some of
the pairs and ratings of the training and validation prompts, and order the images of test prompts: against the pairs
drawn there, and against the labels of all pairs of images of a test prompt.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.vocabulary import QUALITY
from deltaclip.pipeline.rows.cached_rows import load_rows, views_there
from deltaclip.pipeline.rows.pair_rows import RowPairs
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.scoring.ordering import ordering
from deltaclip.pipeline.training.bases import fit_bases

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.scoring.splits import Split

TIE = 0.06  # of the range: .3 of a scale of 5
FRACTIONS = "0.7,0.1,0.2"
ALL = 1 << 40
# (pairs, ratings) that are learned from.
CURVE = (
    (ALL, ALL),
    (0, ALL),
    (ALL, 0),
    (1000, 0),
    (300, 0),
    (0, 60),
    (0, 125),
    (0, 250),
    (0, 500),
    (0, 1000),
    (ALL, 250),
)


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each number of pairs and ratings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--pairs", type=int, default=5_000)
    parser.add_argument("--splits", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the pairs, and of which are learned from")
    parser.add_argument("--noise", action="store_true", help="pairs whose preferences are drawn by lot")
    given = parser.parse_args(arguments)
    rows = load_rows(given.cache, "cpu", views=views_there(given.cache))
    rows = replace(rows, targets=(QUALITY,))
    pairs = drawn_pairs(rows, given.pairs, seed=given.seed)
    if given.noise:
        lots = np.random.default_rng(given.seed).permutation(pairs.preferred_P)
        flip = np.random.default_rng(given.seed + 1).random(len(pairs)) < 0.5
        pairs = RowPairs(pairs.a_P, pairs.b_P, np.where(flip, 1 - lots, lots))
    print(f"{len(pairs):,} pairs, {(pairs.preferred_P == 0.5).mean():.3f} of them ties, seed {given.seed}")
    for seed in range(42, 42 + given.splits):
        split = split_cache(rows, "grouped", fractions=FRACTIONS, seed=seed)
        for num_pairs, num_ratings in CURVE:
            _print(rows, split, pairs, num_pairs=num_pairs, num_ratings=num_ratings)


def drawn_pairs(rows: CacheRows, count: int, *, seed: int) -> RowPairs:
    """Return pairs of rows of one group, with what one rater would say of them."""
    generator = np.random.default_rng(seed)
    a, b = _all_pairs(rows.rows.text["group"].codes)
    chosen = np.sort(generator.permutation(len(a))[:count])
    swapped = generator.random(len(chosen)) < 0.5
    a, b = np.where(swapped, b[chosen], a[chosen]), np.where(swapped, a[chosen], b[chosen])
    label, sd = rows.label("quality").astype(np.float64), rows.label("quality_std").astype(np.float64)
    score_a, score_b = (label[of] + sd[of] * generator.standard_normal(len(of)) for of in (a, b))
    preferred = np.where(np.abs(score_a - score_b) < TIE, 0.5, (score_a > score_b).astype(np.float64))
    return RowPairs(a, b, preferred)


def _all_pairs(code_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    found = [pair for code in np.unique(code_N) for pair in combinations(np.flatnonzero(code_N == code).tolist(), 2)]
    first, second = zip(*found, strict=True)
    return np.array(first), np.array(second)


def _print(rows: CacheRows, split: Split, pairs: RowPairs, *, num_pairs: int, num_ratings: int) -> None:
    started = time.monotonic()
    seen = np.concatenate([split.train, split.val])
    generator = np.random.default_rng(split.seeds[0])
    learned = pairs.among(seen)
    kept = generator.permutation(len(learned))[:num_pairs]
    learned = RowPairs(learned.a_P[kept], learned.b_P[kept], learned.preferred_P[kept])
    rated = generator.permutation(seen)[:num_ratings]
    label_N = np.full(len(rows.rows), np.nan, dtype=np.float32)
    label_N[rated] = rows.label("quality")[rated]
    numbers = {**rows.rows.numbers, "quality": label_N}
    some = replace(rows, rows=replace(rows.rows, numbers=numbers))
    spoken = {"quality": learned} if len(learned) else {}
    fitted = fit_bases(some, split, labels=["quality"], seed=split.seeds[0], pairs=spoken)
    x_N, group_N = fitted.columns["quality"].numpy(), rows.rows.text["group"].codes
    test = pairs.among(split.test)
    found = ordering(x_N[test.a_P] - x_N[test.b_P], test.preferred_P, groups=group_N[test.a_P])
    inside = np.isin(np.arange(len(group_N)), split.test)
    a, b = _all_pairs(np.where(inside, group_N, -np.arange(len(group_N)) - 2))
    truth = (np.sign(rows.label("quality")[a] - rows.label("quality")[b]) + 1) / 2
    by_label = ordering(x_N[a] - x_N[b], truth, groups=group_N[a])
    words = "  ".join(
        f"{name} {one.share:.3f} ({one.share_ci[0]:.3f} to {one.share_ci[1]:.3f}) of {one.n:,}"
        for name, one in (("choices", found), ("labels", by_label))
    )
    seconds = time.monotonic() - started
    print(
        f"split {split.seeds[0]}: {len(learned):5,} pairs {len(rated):5,} ratings: {words}, {seconds:.0f} s", flush=True
    )


if __name__ == "__main__":
    main()
