"""The pairs of a cache that people chose between: which side of a split they are on, and what they speak for.

Knows rows and splits. Must not know how anything is learned.

Shapes: N rows of the cache, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.scoring.splits import Split


@dataclass(frozen=True)
class RowPairs:
    """P pairs of rows that speak for one target; `preferred_P` is the probability that a is preferred, .5 a tie."""

    a_P: NDArray[np.int64]
    b_P: NDArray[np.int64]
    preferred_P: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.a_P)

    def among(self, chosen: NDArray[np.int64]) -> RowPairs:
        """Return the pairs both of whose rows are chosen."""
        if not len(self):
            return self
        is_chosen_N = np.zeros(
            max(int(self.a_P.max()), int(self.b_P.max()), int(chosen.max(initial=0))) + 1, dtype=bool
        )
        is_chosen_N[chosen] = True
        kept_P = is_chosen_N[self.a_P] & is_chosen_N[self.b_P]
        return RowPairs(self.a_P[kept_P], self.b_P[kept_P], self.preferred_P[kept_P])


def pairs_of(rows: CacheRows, target: str) -> RowPairs:
    """Return the pairs of a cache that speak for a target."""
    stored = rows.pairs
    if stored is None:
        nothing = np.empty(0, dtype=np.int64)
        return RowPairs(nothing, nothing, np.empty(0))
    own_P = stored.target_P == [one.name for one in rows.targets].index(target)
    return RowPairs(stored.a_P[own_P], stored.b_P[own_P], stored.preferred_P[own_P].astype(np.float64))


def spoken_for(rows: CacheRows) -> list[str]:
    """Return the targets that pairs of the cache speak for."""
    return [target.name for target in rows.targets if len(pairs_of(rows, target.name))]


def count_across(rows: CacheRows, split: Split) -> int:
    """Return how many pairs have their images on two sides of a split: none of them is learned from or judged by."""
    if rows.pairs is None:
        return 0
    side_N = np.zeros(len(rows.rows), dtype=np.int8)
    side_N[split.val], side_N[split.test] = 1, 2
    return int((side_N[rows.pairs.a_P] != side_N[rows.pairs.b_P]).sum())
