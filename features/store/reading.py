"""Which parts of a dataset to read for some of its rows: few calls, each of bounded size.

Datasets of vectors are contiguous, so every range of rows is aligned; what a call costs beside the bytes is about
0.1 ms. Knows row numbers only.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

PIECE_BYTES = 8 << 20  # read at a time
GAP_BYTES = 256 << 10  # a gap between two rows up to which reading through it costs less than another call


def pieces(entries_K: NDArray[np.int64], row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Yield (which of the entries, which rows of the dataset to read for them); entries are rising and distinct."""
    gap, reach = max(1, GAP_BYTES // row_bytes), max(1, PIECE_BYTES // row_bytes)
    borders = [0, *(np.flatnonzero(np.diff(entries_K) > gap) + 1).tolist(), len(entries_K)]
    for first, last in pairwise(borders):
        while first < last:
            start = int(entries_K[first])
            end = first + int(np.searchsorted(entries_K[first:last], start + reach))
            yield slice(first, end), slice(start, int(entries_K[end - 1]) + 1)
            first = end  # noqa: PLW2901 - the rest of this stretch
